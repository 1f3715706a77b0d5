"""What the text-to-text objectives share: documents become pairs of a source and a target, pairs become an example, and
the loss is over the targets.

    sources [5 9 3] and [8 3], their targets [6 7 3] and [4 3]; eos 3, padding 0

    encoder-decoder    tokens          [5 9 3 8 3 0]    segments          [1 1 1 2 2 0]
                       decoder_tokens  [0 6 7 0 4 0]    decoder_segments  [1 1 1 2 2 0]
                       labels          [6 7 3 4 3 0]    weights           [1 1 1 1 1 0]

    decoder            tokens    [5 9 3 6 7 3 8 3 4 3 0]
                       segments  [1 1 1 1 1 1 2 2 2 2 0]
                       labels    [9 3 6 7 3 8 3 4 3 0 0]
                       weights   [0 0 1 1 1 0 0 1 1 0 0]

Each document is a pair and a segment of its own, so that none sees its neighbour; where `config.data.isolate` is False,
all documents of a row are one. Both sides end with eos, which a stored document has already; a bos that it begins with
stays in front of the source. A pair that finds no room is made from as much of one end of its document as does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.nn import positions
from jaxlm.nn.loss import Sums, cross_entropy
from jaxlm.objectives import clm

Arrays = Mapping[str, np.ndarray]
Sizes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def documents(row: Arrays, words: Words) -> list[np.ndarray]:
    """The documents of a packed row, each without the eos that it ends with."""
    return [part[:-1] if part[-1] == words.eos else part for part in pieces(row)]


def pieces(row: Arrays) -> list[np.ndarray]:
    """The documents of a packed row, or pieces of them, as they stand there."""
    segments = row["segments"]
    borders = np.flatnonzero(segments[1:] != segments[:-1]) + 1
    parts = zip(np.split(row["tokens"], borders), segments[np.append(0, borders)])
    return [part for part, segment in parts if segment]


def shuffled(documents: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """In any order, so that it is not always the same one that finds no room."""
    return [documents[i] for i in rng.permutation(len(documents))]


def share(name: str, value: Any) -> float:
    """An option that is a share of tokens; raises `Mistake` for one that is not between 0 and 1."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise Mistake(f"config.objective.{name}={value!r}: a share of the tokens, above 0 and below 1")
    return value


def eos(words: Words) -> int:
    """What a source and a target end with; raises `Mistake` for a tokenizer without it."""
    if words.eos is None:
        raise Mistake("text-to-text objectives end a text with eos, and the tokenizer has none; choose another kind")
    return words.eos


def cost(
    tokens: np.ndarray, row: int, sizes: Sequence[tuple[np.ndarray, np.ndarray]], room: tuple[int, int], kind: str
) -> np.ndarray:
    """How many of a `row`'s tokens documents of so many take, int[n]: they take as large a share of it as the largest
    that their sources and targets take of a sheet's `room`, for any of the `sizes` that they may come to.
    """
    shares = [tokens]
    for source, target in sizes:
        if kind == "decoder":
            shares.append(-(-row * (source + target) // (room[0] + 1)))
        else:
            shares += [-(-row * size // most) for size, most in zip((source, target), room)]
    return np.minimum(np.max(shares, axis=0), row)


class Sheet:
    """An example in the making: `length` tokens for an encoder and `targets` for a decoder, or for a decoder alone
    `length` tokens and the one that follows them.
    """

    def __init__(self, kind: str, length: int, targets: int, words: Words):
        self._kind, self._words, self._room = kind, words, (length, targets)
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def fits(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Whether pairs of such lengths, their eos included, find room beside those that are there."""
        used = [sum(len(pair[side]) for pair in self._pairs) for side in range(2)]
        if self._kind == "decoder":
            return source + target + sum(used) <= self._room[0] + 1
        return (source + used[0] <= self._room[0]) & (target + used[1] <= self._room[1])

    def room(self, source: int, target: int) -> float:
        """By how much a pair of such lengths, their eos included, could be longer; below 1 it finds no room."""
        used = [sum(len(pair[side]) for pair in self._pairs) for side in range(2)]
        if self._kind == "decoder":
            return (self._room[0] + 1 - sum(used)) / (source + target)
        return min((self._room[0] - used[0]) / source, (self._room[1] - used[1]) / target)

    def cut(self, document: np.ndarray, rng: np.random.Generator, sizes: Sizes) -> np.ndarray:
        """The document, or as much of one of its ends as fits; perhaps nothing.

        `sizes(document)` are the lengths of source and target for each number of its first tokens, from 1 on; for
        what can be no pair they are large.
        """
        if not len(document) or self.fits(*(side[-1:] for side in sizes(document)))[0]:
            return document
        way = int(rng.choice([1, -1]))
        fits = np.flatnonzero(self.fits(*sizes(document[::way])))
        return document[::way][: fits[-1] + 1 if len(fits) else 0][::way]

    def add(self, source: np.ndarray, target: np.ndarray) -> None:
        """Write a pair, neither side with its eos yet."""
        end = eos(self._words)
        self._pairs.append((np.append(source, end), np.append(target, end)))

    def example(self) -> dict[str, np.ndarray]:
        """The arrays that the module's docstring shows."""
        length, targets = self._room
        if self._kind == "decoder":
            joined = [np.concatenate(pair) for pair in self._pairs]
            asked = [np.repeat([0, 1], [len(x) for x in pair]) for pair in self._pairs]
            row = dict(tokens=self._row(joined, length + 1), segments=_numbers(joined, length + 1))
            example = clm.features(row)
            example["weights"] *= np.pad(np.concatenate([np.zeros(0), *asked]), (0, length + 1))[1 : length + 1]
            return example
        sources, answers = ([pair[side] for pair in self._pairs] for side in range(2))
        segments = _numbers(answers, targets)
        start = np.array([self._words.pad])
        return dict(
            tokens=self._row(sources, length), segments=_numbers(sources, length),
            decoder_tokens=self._row([np.append(start, answer[:-1]) for answer in answers], targets),
            decoder_segments=segments, labels=self._row(answers, targets),
            weights=(segments > 0).astype(np.float32),
        )  # fmt: skip

    def _row(self, parts: list[np.ndarray], length: int) -> np.ndarray:
        row = np.full(length, self._words.pad, np.int32)
        whole = np.concatenate([np.zeros(0, np.int32), *parts])
        row[: len(whole)] = whole
        return row


def _numbers(parts: list[np.ndarray], length: int) -> np.ndarray:
    """The segment of each place: 1 for the first part, and 0 behind the last."""
    numbers = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
    return np.pad(numbers, (0, length - len(numbers))).astype(np.int32)


def loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Sums:
    """Sums over the targets' tokens (nats), of an encoder-decoder or a decoder. Without a key: no dropout.

    The options are those of `jaxlm.nn.loss.cross_entropy`.
    """
    how = dict(label_smoothing=label_smoothing, z_loss=z_loss, chunk=chunk)
    if "decoder_tokens" not in batch:
        return clm.loss(model, batch, key, **how)  # type: ignore[arg-type]
    return cross_entropy(states(model, batch, key), model.head, batch["labels"], batch["weights"], **how)  # type: ignore[arg-type]


def states(model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """An encoder-decoder's final hidden states [B, T, D], from which its head reads what it answers.

    A target's row begins with the id that the model begins with when it writes, `config.start`, whatever the example
    has there: the tokenizer does not know it.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    segments_BS, segments_BT = batch["segments"], batch["decoder_segments"]
    tokens_BT = jnp.where(positions.restart(segments_BT) == 0, model.config.start, batch["decoder_tokens"])
    memory_BSD = model.encode(batch["tokens"], segments_BS=segments_BS, key=keys[0])
    return model.hidden(
        tokens_BT, memory_BSD=memory_BSD, segments_BT=segments_BT, memory_segments_BS=segments_BS, key=keys[1]
    )[0]
