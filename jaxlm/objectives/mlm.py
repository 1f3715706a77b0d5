"""Masked language modelling: predict a share of a text's tokens from all others, left and right (BERT,
arXiv:1810.04805).

row                tokens    [1 5 6 7 2 1 8 9 2 0]       features   tokens    [1 5 M 7 2 1 8 9 2 0]
                   segments  [1 1 1 1 1 2 2 2 2 0]                  labels    [0 0 6 0 0 0 0 0 0 0]
                                                                    weights   [0 0 1 0 0 0 0 0 0 0]
                                                                    segments  [1 1 1 1 1 2 2 2 2 0]

Of the tokens chosen, a share `mask` becomes the mask, a share `random` any token that is no special, and the rest stays
what it is. `unit="word"` chooses whole words; `unit="span"` runs of whole words, of 1 to 10 words with a mean of 3.8,
where a run has one fate (SpanBERT, arXiv:1907.10529, section 3.1). The choice is the row's own, and so another one in
each epoch.

With `next`, a row is a piece of one document, and an example a pair of texts

    tokens    [CLS] A A A [SEP] B B [SEP]     types    [0 0 0 0 0 1 1 1]     segments    [1 1 1 1 1 1 1 1]

where `follows` is 1 for B that goes on where A ends, and 2 for one that does not: with "nsp" it is of another document
(BERT), with "sop" it is what stands before A (ALBERT, arXiv:1909.11942). It is 0 where a text is too short to be cut.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import lookup
from jaxlm.data.words import MASK, Words
from jaxlm.nn.loss import Sums, cross_entropy

KINDS = ("encoder",)
EXACT = False

RATE = 0.15
UNITS = ("token", "word", "span")
SPAN = np.cumsum(0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10))  # P(length <= 1, 2, ...) of a geometric law cut at 10

Arrays = Mapping[str, np.ndarray]


def row(
    length: int, known: Words, *, rate: float = RATE, mask: float = 0.8, random: float = 0.1, unit: str = "token",
    next: str | None = None,
) -> int:  # fmt: skip
    """As many tokens as the model reads, less those that stand around a pair.

    Raises `Mistake` for an option that is not, and where the tokenizer lacks a special that is needed.
    """
    if not 0 < rate < 1:
        raise lookup.Mistake(f"config.objective.rate is a share of the tokens, above 0 and below 1, not {rate}")
    if not (0 <= mask <= 1 and 0 <= random <= 1 and mask + random <= 1):
        raise lookup.Mistake(f"config.objective: mask={mask} and random={random} are shares that sum up to 1 at most")
    lookup.key("config.objective.unit", unit, dict.fromkeys(UNITS))
    known.find("mask", MASK)
    if next is None:
        return length
    lookup.key("config.objective.next", next, dict.fromkeys(("nsp", "sop")))
    if known.bos is None or known.eos is None:
        raise lookup.Mistake(
            f"config.objective.next={next!r}: the tokenizer has no bos or no eos, which stand around the texts"
        )
    return length - 3


def pairs(*, next: str | None = None) -> bool:
    """Pairs are made of one document's text, and perhaps another's."""
    return next is not None


def apart(*, next: str | None = None) -> bool:
    """The loss of pairs has a mean over those of the batch."""
    return next is None


def features(
    row: Arrays, rng: np.random.Generator | None, known: Words, length: int, *, rate: float = RATE, mask: float = 0.8,
    random: float = 0.1, unit: str = "token", next: str | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row, or one of a document and another beside it -> the model's example."""
    assert rng is not None
    example = {name: row[name].astype(np.int32) for name in ("tokens", "segments")}
    if next is not None:
        example = _pair(row, rng, known, length, other=next == "nsp")
    tokens = example["tokens"]
    starts, stops, joined = _units(tokens, example["segments"], known, whole=unit != "token")
    if unit == "span":
        spans = _runs(starts, stops, joined, rng, rate)
    else:
        spans = _some(starts, stops, rng, rate)
    sizes = spans[:, 1] - spans[:, 0]
    places = np.repeat(spans[:, 0] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    fate = np.repeat(rng.random(len(spans)), sizes) if unit == "span" else rng.random(len(places))
    drawn = places[(fate >= mask) & (fate < mask + random)]
    seen = tokens.copy()
    seen[places[fate < mask]] = known.find("mask", MASK)
    seen[drawn] = rng.choice(np.flatnonzero(~known.special_V), len(drawn))
    chosen = np.isin(np.arange(length), places)
    labels, weights = np.where(chosen, tokens, 0).astype(np.int32), chosen.astype(np.float32)
    return example | {"tokens": seen, "labels": labels, "weights": weights}


def budget(rate: float, tokens: int) -> int:
    """How many of so many tokens are chosen at most: their share, and one where there is any."""
    return min(tokens, max(1, round(rate * tokens)))


def _units(
    tokens: np.ndarray, segments: np.ndarray, known: Words, *, whole: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What may be chosen, tokens or whole words: where each starts and stops, and whether the one before touches it."""
    may = (segments > 0) & ~known.special_V[tokens]
    cut = np.append(True, segments[1:] != segments[:-1])
    begins = may & (cut | ~np.append(False, may[:-1]) | (known.begins(tokens) if whole else True))
    starts = np.flatnonzero(begins)
    ends = np.append(np.flatnonzero(begins | ~may), len(tokens))
    stops = ends[np.searchsorted(ends, starts, side="right")]
    joined = np.append(False, starts[1:] == stops[:-1])[: len(starts)] & ~cut[starts]
    return starts, stops, joined


def _some(starts: np.ndarray, stops: np.ndarray, rng: np.random.Generator, rate: float) -> np.ndarray:
    """Units drawn at random, int[n, 2] (start, stop), as long as they fit in the share that is to be chosen."""
    sizes, chosen = (stops - starts).tolist(), []
    left = budget(rate, sum(sizes))
    for one in rng.permutation(len(sizes)).tolist():
        if not left:
            break
        if sizes[one] <= left:
            chosen.append(one)
            left -= sizes[one]
    return np.stack([starts[chosen], stops[chosen]], axis=1)


def _runs(
    starts: np.ndarray, stops: np.ndarray, joined: np.ndarray, rng: np.random.Generator, rate: float
) -> np.ndarray:
    """Runs of units, int[n, 2] (start, stop): a length is drawn, then one of the places where it fits.

    One that fits nowhere becomes shorter, as the last one does, for which the share has no more room.
    """
    left, longest, chosen = budget(rate, int((stops - starts).sum())), len(SPAN), []
    taken, parted = np.zeros(len(starts), bool), np.cumsum(~joined)
    for length in 1 + np.searchsorted(SPAN, rng.random(len(starts))):
        for size in range(min(int(length), longest, len(starts)), 0, -1):
            before = np.append(0, np.cumsum(taken))  # how many units before each are taken
            first, last = slice(len(starts) - size + 1), slice(size - 1, None)
            fits = (before[size:] == before[:-size]) & (parted[first] == parted[last])
            fits &= stops[last] - starts[first] <= left
            if fits.any():
                break
            longest = size - 1
        else:
            break
        one = int(rng.choice(np.flatnonzero(fits)))
        taken[one : one + size] = True
        chosen.append((starts[one], stops[one + size - 1]))
        left -= int(stops[one + size - 1] - starts[one])
        if not left:
            break
    return np.asarray(chosen, int).reshape(-1, 2)


def _pair(row: Arrays, rng: np.random.Generator, known: Words, length: int, *, other: bool) -> dict[str, np.ndarray]:
    """A piece of a document as two texts; the second is from elsewhere in half of all cases.

    Nothing but what the texts say tells which: another document's text is cut at the same share of its length, and the
    second text takes the length of the shorter one whether it follows or not.
    """
    share, follows = rng.uniform(0.3, 0.7), rng.random() < 0.5
    one, two = _halves(row["tokens"][row["segments"] > 0], share, known)
    if other:
        _, strange = _halves(row["other_tokens"][row["other_segments"] > 0], share, known)
        two = (two if follows else strange)[: min(len(two), len(strange))]
    elif not follows:
        one, two = two, one
    parts = [[known.bos], one, [known.eos]], [two, [known.eos]]
    tokens, types, segments = np.zeros((3, length), np.int32)
    first, second = (np.concatenate(part).astype(np.int32) for part in parts)
    size = len(first) + len(second)
    tokens[:size], types[len(first) : size], segments[:size] = np.append(first, second), 1, 1
    told = (1 if follows else 2) if len(one) and len(two) else 0
    return {"tokens": tokens, "segments": segments, "types": types, "follows": np.asarray(told, np.int32)}


def _halves(tokens: np.ndarray, share: float, known: Words) -> tuple[np.ndarray, np.ndarray]:
    """A text in two parts, cut where a word begins next to `share` of it; its first and last word, which a row's ends
    may have cut, are left out.

    The second part is empty where there are fewer than four words.
    """
    text = tokens[(tokens != known.bos) & (tokens != known.eos)]
    edges = np.flatnonzero(known.begins(text))
    if len(edges) < 4:
        return text, text[:0]
    first, *inner, last = edges[1:].tolist()
    cut = min(inner, key=lambda edge: abs(edge - first - share * (last - first)))
    return text[first:cut], text[cut:last]


def loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    rate: float = RATE,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Sums:
    """Sums over the chosen tokens (nats); of pairs, the loss has the mean cross-entropy of `follows` too (section A.2).

    The head is spent on the chosen tokens alone. Without a key: no dropout. Raises `Mistake` for a model that lacks the
    heads for it.
    """
    x_BTD, _ = model.hidden(batch["tokens"], segments_BT=batch["segments"], types_BT=batch.get("types"), key=key)
    few_BTD, labels, weights, _ = gathered(x_BTD, batch, rate)
    sums = cross_entropy(
        model.for_head(few_BTD), model.head, labels, weights, label_smoothing=label_smoothing, chunk=chunk
    )
    if "follows" not in batch:
        return sums
    if not hasattr(model, "follows"):
        raise lookup.Mistake('config.objective.next: this model has no head for the next sentence; name="bert" has')
    told = batch["follows"]
    log_BC = jax.nn.log_softmax(model.follows(model.pool(x_BTD)))
    real, kind = (told > 0).astype(jnp.float32), jnp.maximum(told - 1, 0)
    nll = -(jnp.take_along_axis(log_BC, kind[:, None], axis=1)[:, 0] * real).sum()
    right = ((log_BC.argmax(axis=1) == kind) * real).sum()
    count = real.sum()
    others = {"next_loss": (nll, count), "next_accuracy": (right, count)}
    return sums._replace(loss=sums.loss + nll / jnp.maximum(count, 1.0) * sums.weight, others=others)


def gathered(
    x_BTD: jax.Array, batch: Mapping[str, jax.Array], rate: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The states of the chosen tokens, their labels and weights, and where they are: as many in each row as may be."""
    weights, places = jax.lax.top_k(batch["weights"], budget(rate, x_BTD.shape[1]))
    labels = jnp.take_along_axis(batch["labels"], places, axis=1)
    return jnp.take_along_axis(x_BTD, places[..., None], axis=1), labels, weights, places
