"""Does a model of span corruption fill gaps in held-out text better than an n-gram that knows one side of them?

    python -m scripts.span_baseline --workdir=runs/t5_brown

All are asked for the same tokens, those in the gaps of the run's own held-out documents, in nats per token and given
the true tokens before them in their gap. Gaps are drawn as T5 defines them, 15 % of the tokens in spans of 3 on
average, whatever the run was trained on (--rate, --span):

    t5                   reads both sides. It is not told how long a gap is, and so pays for going on at every token
    t5, told             the same, its probabilities among tokens of text alone, since no gap ends here
    5-gram               modified Kneser-Ney on the same training documents: the four tokens before, across the gaps
    5-gram, backwards    the four tokens behind, of a gap from its last token to its first
    5-gram, either way   for each gap the mean of both probabilities

"ends" is what t5 pays for the gaps' ends: what it knows of their lengths, which nobody tells it either.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlm import lm as lms
from jaxlm import objectives
from jaxlm.data import rows
from jaxlm.data.store import open as open_store
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.models import ngram
from jaxlm.objectives import _pairs

BATCH = 8


def gaps(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The text that a pair was made from, and for each token the number of its gap; 0 for none."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = last = []
        else:
            last.append(token)
    text, number, count = [], [], 0
    for token in source[:-1]:
        span = spans.get(token)
        count += span is not None
        text += [token] if span is None else span
        number += [0] if span is None else [count] * len(span)
    return np.array(text), np.array(number)


def measure(
    workdir: str, store: str | None = None, order: int = 5, rate: float = 0.15, span: float = 3.0
) -> dict[str, float]:
    """Nats per token of the gaps, by who is asked; `tokens`, `gaps`, and t5's share of right tokens. A `rate` of the
    tokens is in gaps, of `span` tokens on average.

    Raises `Mistake` for a workdir of another objective.
    """
    lm = lms.load(workdir)
    section = lm.config.to_dict()["objective"] or {}
    if section.get("name") != "span" or lm.blueprint.kind != "encoder-decoder":
        raise Mistake(f"{workdir} is no encoder-decoder of span corruption")
    tokens, words = open_store(store or lm.config.store), Words.of(lm.tokenizer)
    section = dict(section, rate=rate, span=span)
    task = objectives.of(section, length=lm.config.length, words=words, kind=lm.blueprint.kind)
    plain = ~words.special_V
    answer = jax.jit(lambda params, batch: _answers(lm.blueprint.bind(params), batch, plain))
    sums = dict.fromkeys(
        ("t5", "t5, told", "ends", f"{order}-gram", f"{order}-gram, backwards", "either", "right"), 0.0
    )
    count = several = 0
    for name in tokens.sources:
        held_out = rows.validation(tokens, name, length=task.row, cost=task.cost)
        training = ngram._documents(tokens.split(name, "train"))
        forward = ngram.fit(training, order, words.vocab)
        backward = ngram.fit([document[::-1] for document in training], order, words.vocab)
        for batch in rows.batches(held_out, batch=BATCH, features=task.features, seed=0):
            nll, told, best = (np.asarray(x, np.float64) for x in answer(lm.params, batch))
            asked = (batch["weights"] > 0) & plain[batch["labels"]]
            sums["t5"] += nll[asked].sum()
            sums["t5, told"] += told[asked].sum()
            sums["right"] += (best == batch["labels"])[asked].sum()
            sums["ends"] += nll[(batch["weights"] > 0) & ~asked].sum()
            for example in (dict(zip(batch, row)) for row in zip(*batch.values())):
                for segment in range(1, int(example["segments"].max()) + 1):
                    source = example["tokens"][example["segments"] == segment].tolist()
                    target = example["labels"][example["decoder_segments"] == segment].tolist()
                    text, number = gaps(source, target, words.sentinels)
                    left = np.append(0.0, forward.nll(text))
                    right = np.append(0.0, backward.nll(text[::-1]))[::-1]
                    one, other = (np.bincount(number, x)[1:] for x in (left, right))
                    size = np.bincount(number)[1:]
                    last = number[-1] > 0  # a gap at the end has nothing behind it: there, backwards is no guess
                    other[-1:] = one[-1:] if last else other[-1:]
                    sums[f"{order}-gram"] += one.sum()
                    sums[f"{order}-gram, backwards"] += other.sum()
                    sums["either"] -= np.logaddexp(np.log(0.5) - one, np.log(0.5) - other).sum()
                    count, several = count + size.sum(), several + len(size)
    found = {name: float(total) / count for name, total in sums.items()}
    found[f"{order}-gram, either way"] = found.pop("either")
    return found | dict(tokens=int(count), gaps=several)


def _answers(model, batch, plain_V):
    """For each label its nats, its nats among tokens of text alone, and the likeliest token."""
    logits_BTV = model.head(_pairs.states(model, batch))
    picked_BT = jnp.take_along_axis(logits_BTV, batch["labels"][..., None], -1)[..., 0]
    text_BTV = jnp.where(plain_V, logits_BTV, -jnp.inf)
    norms = (jax.nn.logsumexp(x, axis=-1) for x in (logits_BTV, text_BTV))
    return *(norm_BT - picked_BT for norm_BT in norms), logits_BTV.argmax(-1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.span_baseline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--workdir", required=True, help="of `jaxlm train` with the objective span")
    parser.add_argument("--store", help="the token store, where it has moved")
    parser.add_argument("--order", type=int, default=5, help="tokens in an n-gram (default: 5)")
    parser.add_argument("--rate", type=float, default=0.15, help="share of the tokens in gaps (default: T5's, 0.15)")
    parser.add_argument("--span", type=float, default=3.0, help="mean tokens in a gap (default: T5's, 3)")
    flags = parser.parse_args(arguments)
    try:
        found = measure(flags.workdir, flags.store, flags.order, flags.rate, flags.span)
    except Mistake as mistake:
        parser.error(str(mistake))
    count, several, right = (found.pop(name) for name in ("tokens", "gaps", "right"))
    print(f"{count:,} held-out tokens in {several:,} gaps; t5 gets {right:.1%} right")
    table = Table("nats per token", "")
    for name, nats in found.items():
        table.add_row(name, f"{nats:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
