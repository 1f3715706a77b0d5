"""How well a model predicts text: loss, perplexity and bits per UTF-8 byte, over documents of any length.

    evaluate(nll, [([2, 71, 12, 9, 3], 11)], context=1024, stride=512)      [Score(nats=16.1, tokens=4, bytes=11)]

A document is [bos] + text + [eos], as a token store holds it; its first token is given, the others are predicted, each
once, and `bytes` are of the text that they stand for: where no bos begins a document, all text but its first token
(`jaxlm.data.tokenizers.predicted_bytes`). One longer than the context is read in windows that overlap, so that each
token has `context - stride` tokens before it at least:

    context 4, stride 2     tokens   0 1 2 3 4 5 6 7 8
                            reads    0 1 2 3              scores 1 2 3 4
                                         2 3 4 5          scores     5 6
                                             4 5 6 7      scores         7 8
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
import math

import numpy as np

from jaxlm.decode.engine import bucket
from jaxlm.lookup import Mistake

WINDOWS = 64  # batches' worth of windows that are sorted by length together, so that a batch holds little padding

NLL = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over predicted tokens, eos included; `bytes` counts their text alone, in UTF-8. Scores add up."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """What compares models with different tokenizers: all nats, in bits, per byte of text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first) for a document of `length` tokens: of start .. stop-1, those from `first` on are scored."""
    start, first = 0, 1
    while first < length:
        stop = min(start + context + 1, length)
        yield start, stop, first
        start, first = start + stride, stop


def evaluate(
    nll: NLL,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
) -> list[Score]:
    """A score for each document, given as (token ids, UTF-8 bytes of the text after the first).

    `nll(rows[B, T + 1])` gives the negative log-likelihood in nats [B, T] of tokens 1.. of each row. It sees B = batch
    and few different T up to `context`. Without a stride, windows overlap by half. Raises `Mistake` for a stride
    outside 1 to `context`.
    """
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise Mistake(f"stride={stride} is outside 1 to {context}, the context")
    scores: list[Score] = []

    def pieces() -> Iterator[tuple[int, np.ndarray, int]]:
        for tokens, size in documents:
            tokens = np.asarray(tokens, np.int32)
            scores.append(Score(bytes=int(size)))
            for start, stop, first in windows(len(tokens), context, stride):
                yield len(scores) - 1, tokens[start:stop], first - start

    several = pieces()
    while group := list(itertools.islice(several, WINDOWS * batch)):
        group.sort(key=lambda piece: -len(piece[1]))
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            rows = np.zeros((batch, 1 + bucket(len(part[0][1]) - 1, 16, max(context, 16))), np.int32)
            for row, (_, tokens, _) in zip(rows, part):
                row[: len(tokens)] = tokens
            nats = np.asarray(nll(rows), np.float64)
            for row, (number, tokens, first) in zip(nats, part):
                scores[number] += Score(float(row[first - 1 : len(tokens) - 1].sum()), len(tokens) - first)
    return scores
