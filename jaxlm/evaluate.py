"""Measure how well a trained model predicts text: loss, perplexity, bits per byte.

    jaxlm evaluate --workdir=runs/quickstart                                        the run's own validation documents
    jaxlm evaluate --workdir=runs/quickstart --data=text:novel.txt --json=novel.json
    jaxlm evaluate --workdir=runs/quickstart --data=store:data/python_docs:docs:validation --stride=64 --limit=100

--data is a source as for `jaxlm prepare` (text:PATH, jsonl:PATH, python-docs:, ...) or store:PATH[:source[:split]]. A
document longer than --context tokens (those of a training row unless given) is read in windows, --stride tokens apart
(half the context). --limit bounds how many documents are read; --json=- prints JSON instead of the table.
"""

from collections.abc import Iterable, Iterator
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlm import config, lm, program
from jaxlm.data import sources, store
from jaxlm.evals import perplexity
from jaxlm.evals.perplexity import Score
from jaxlm.lookup import Mistake

Documents = Iterable[tuple[np.ndarray, int]]


def documents(model: lm.LM, data: str) -> dict[str, Documents]:
    """What `--data` names: documents as (token ids, bytes), by the name of their source.

    Raises `Mistake` for what is not there, and for a store that another tokenizer made.
    """
    kind, _, rest = data.partition(":")
    if kind != "store":
        return {data: _read(model, sources.find(data))}
    path, source, split = _parts(rest)
    opened = store.open(path)
    made, ours = opened.tokenizer(), model.tokenizer
    if made.fingerprint != ours.fingerprint:
        ends = [f"bos {tok.add_bos}, eos {tok.add_eos}" for tok in (made, ours)]
        raise Mistake(
            f"store {path} was made with another tokenizer than the model's, or one that puts other ends to a document "
            f"({ends[0]}; the model's {ends[1]}); give its text as a source instead"
        )
    found = {name: opened.split(name, split) for name in ([source] if source else opened.sources)}
    return {f"{name} {split}": _stored(documents) for name, documents in found.items()}


def _parts(rest: str) -> tuple[str, str | None, str]:
    """PATH[:source[:split]], where the path may be gs://bucket/store."""
    scheme, slashes, rest = rest.rpartition("://")
    path, source, split, *_ = [*rest.split(":"), None, None]
    return f"{scheme}{slashes}{path}", source or None, split or "validation"


def _read(model: lm.LM, source: sources.Source) -> Iterator[tuple[np.ndarray, int]]:
    for document in source.read():
        yield model.document(document.text), len(document.text.encode())


def _stored(split: store.Split) -> Iterator[tuple[np.ndarray, int]]:
    for i in range(len(split)):
        yield split.document(i), int(split.bytes[i])


def report(total: Score, count: int) -> dict[str, Any]:
    """The figures of one table row: losses in nats per token, sums of what was predicted."""
    return dict(
        documents=count, tokens=total.tokens, bytes=total.bytes, nats=total.nats, loss=total.loss,
        perplexity=total.perplexity, bits_per_byte=total.bits_per_byte,
    )  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """The figures for a terminal."""
    out = Table("data", box=None)
    for name in ("documents", "tokens", "bytes", "loss", "perplexity", "bits per byte"):
        out.add_column(name, justify="right")
    for name, row in rows.items():
        counts = [f"{row[key]:,}" for key in ("documents", "tokens", "bytes")]
        out.add_row(name, *counts, f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", f"{row['bits_per_byte']:.4f}")
    return out


def main(argv: list[str]) -> int:
    """Evaluate each source that `--data` names, and all of them together."""
    args = config.parse(
        __doc__ or "",
        argv,
        config=False,
        data=str,
        stride=int,
        context=int,
        json=str,
        limit=int,
        batch=8,
        step="newest",
    )
    model = lm.load(args.workdir, step=args.step)
    store = config.read(args.workdir).get("store")
    if not (args.data or store):
        raise Mistake(f"{args.workdir} was not trained on a store; name what to evaluate on: --data=SOURCE")
    data = args.data or f"store:{store}"
    context = model.context if args.context is None else args.context
    rows, scores = {}, []
    for name, found in documents(model, data).items():
        some = itertools.islice(found, args.limit)
        each = perplexity.evaluate(model.nll, some, context=context, stride=args.stride, batch=args.batch)
        rows[name] = report(sum(each, Score()), len(each))
        scores += each
    if not sum(score.tokens for score in scores):
        raise Mistake(f"--data={data} holds nothing to predict")
    if len(rows) > 1:
        rows["all"] = report(sum(scores, Score()), len(scores))
    if args.json:
        text = json.dumps(dict(workdir=args.workdir, data=data, results=rows), indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")
    if args.json != "-":
        Console().print(table(rows))
    return 0


if __name__ == "__main__":
    program.run("evaluate", main)
