"""Measure how well a trained model predicts text: loss, perplexity, bits per byte; or does what it was trained to do.

    jaxlm evaluate --workdir=runs/quickstart                                        the run's own validation documents
    jaxlm evaluate --workdir=runs/quickstart --data=text:novel.txt --json=novel.json
    jaxlm evaluate --workdir=runs/quickstart --data=store:data/python_docs:docs:validation --stride=64 --limit=100

--data is a source as for `jaxlm prepare` (text:PATH, jsonl:PATH, python-docs:, ...) or store:PATH[:source[:split]]. A
document longer than --context tokens (those of a training row unless given) is read in windows, --stride tokens apart
(half the context). --limit bounds how many documents are read; --json=- prints JSON instead of the table.

An encoder or encoder-decoder predicts no text from the left: it is measured by its own objective, with the same noise
every time, on a store (--data=store:PATH) that its own tokenizer made.
"""

from collections.abc import Iterable, Iterator
import functools
import itertools
import json
from typing import Any

from etils import epath
import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from jaxlm import config, lm, lookup, objectives, program
from jaxlm.data import rows, sources, store
from jaxlm.data.tokenizers import Tokenizer, predicted_bytes
from jaxlm.data.words import Words
from jaxlm.evals import held_out, perplexity
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
    opened = _opened(path, model)
    found = {name: opened.split(name, split) for name in ([source] if source else opened.sources)}
    return {f"{name} {split}": _stored(documents, model.tokenizer) for name, documents in found.items()}


def _opened(path: str, model: lm.LM) -> store.Store:
    opened = store.open(path)
    made, ours = opened.tokenizer(), model.tokenizer
    if made.fingerprint != ours.fingerprint:
        ends = [f"bos {tok.add_bos}, eos {tok.add_eos}" for tok in (made, ours)]
        raise Mistake(
            f"store {path} was made with another tokenizer than the model's, or one that puts other ends to a document "
            f"({ends[0]}; the model's {ends[1]}); give its text as a source instead"
        )
    return opened


def _parts(rest: str) -> tuple[str, str | None, str]:
    """PATH[:source[:split]], where the path may be gs://bucket/store."""
    scheme, slashes, rest = rest.rpartition("://")
    path, source, split, *_ = [*rest.split(":"), None, None]
    return f"{scheme}{slashes}{path}", source or None, split or "validation"


def _read(model: lm.LM, source: sources.Source) -> Iterator[tuple[np.ndarray, int]]:
    for document in source.read():
        row = model.document(document.text)
        yield row, predicted_bytes(model.tokenizer, row, len(document.text.encode()))


def _stored(split: store.Split, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    for i in range(len(split)):
        document = split.document(i)
        yield document, predicted_bytes(tokenizer, document, int(split.bytes[i]))


def by_objective(model: lm.LM, data: str, *, batch: int, limit: int | None) -> dict[str, dict[str, float]]:
    """The figures of the model's own objective, by source of a store: loss in nats per token that it asks for.

    Raises `Mistake` for data that is no store, and for a model that was not trained here.
    """
    kind, _, rest = data.partition(":")
    settings = model.config.to_dict() if model.config else {}
    if "length" not in settings:
        raise Mistake(f"{model.blueprint.name} is no decoder, and has no objective of ours to be measured by")
    if kind != "store":
        raise Mistake(
            f"--data={data}: {model.blueprint.name} is no decoder, so it is measured by its objective on a store: make "
            "one with `jaxlm prepare` and the run's tokenizer, and give --data=store:PATH"
        )
    path, source, split = _parts(rest)
    opened, words = _opened(path, model), Words.of(model.tokenizer)
    if split != "validation":
        raise Mistake(f"--data={data}: an objective is measured on the validation split, not {split!r}")
    task = objectives.of(settings.get("objective"), length=settings["length"], words=words, kind=model.blueprint.kind)
    loss = jax.jit(lambda params, batch: task.loss(model.blueprint.bind(params), batch))
    found = {}
    for name in [source] if source else [s for s in opened.sources if len(opened.split(s, "validation"))]:
        held = rows.validation(opened, name, length=task.row, documents=limit, pairs=task.pairs, cost=task.cost)
        seed = None if task.exact else 0
        each = rows.batches(held, batch=batch, features=task.features, seed=seed)
        found[f"{name} validation"] = held_out.measure(functools.partial(loss, model.params), each)
    if not sum(row["tokens"] for row in found.values()):
        raise Mistake(f"--data={data} holds nothing to predict")
    return found


def report(total: Score, count: int) -> dict[str, Any]:
    """The figures of one table row: losses in nats per token, sums of what was predicted."""
    return dict(
        documents=count, tokens=total.tokens, bytes=total.bytes, nats=total.nats, loss=total.loss,
        perplexity=total.perplexity, bits_per_byte=total.bits_per_byte,
    )  # fmt: skip


def by_text(
    model: lm.LM, data: str, *, context: int, stride: int | None, batch: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """A decoder's figures by source, and of all together. Raises `Mistake` for data without a token to predict."""
    results, scores = {}, []
    for name, found in documents(model, data).items():
        some = itertools.islice(found, limit)
        each = perplexity.evaluate(model.nll, some, context=context, stride=stride, batch=batch)
        results[name] = report(sum(each, Score()), len(each))
        scores += each
    if not sum(score.tokens for score in scores):
        raise Mistake(f"--data={data} holds nothing to predict")
    return results | ({"all": report(sum(scores, Score()), len(scores))} if len(results) > 1 else {})


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The figures for a terminal."""
    keys = [key for key in next(iter(results.values())) if key != "nats"]
    out = Table("data", *(Column(key.replace("_", " "), justify="right") for key in keys), box=None)
    whole = ("documents", "tokens", "bytes")
    for name, row in results.items():
        out.add_row(name, *(f"{row[key]:,.0f}" if key in whole else f"{row[key]:,.4f}" for key in keys))
    return out


def main(argv: list[str]) -> int:
    """Evaluate each source that `--data` names."""
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
    lookup.within("--", 1, batch=args.batch, limit=1 if args.limit is None else args.limit)
    if args.json not in (None, "-"):
        program.output("--json", args.json)
    model = lm.load(args.workdir, step=args.step)
    store = config.read(args.workdir).get("store")
    if not (args.data or store):
        raise Mistake(f"{args.workdir} was not trained on a store; name what to evaluate on: --data=SOURCE")
    data, how = args.data or f"store:{store}", dict(batch=args.batch, limit=args.limit)
    if model.blueprint.kind == "decoder":
        context = model.context if args.context is None else args.context
        results = by_text(model, data, context=context, stride=args.stride, **how)
    else:
        if (args.context, args.stride) != (None, None):
            raise Mistake(
                f"--context and --stride are for decoders; {model.blueprint.name} reads rows of its objective"
            )
        results = by_objective(model, data, **how)
    if args.json:
        text = json.dumps(dict(workdir=args.workdir, data=data, results=results), indent=1)
        print(text) if args.json == "-" else epath.Path(args.json).write_text(text + "\n")
    if args.json != "-":
        Console().print(table(results))
    return 0


if __name__ == "__main__":
    program.run("evaluate", main)
