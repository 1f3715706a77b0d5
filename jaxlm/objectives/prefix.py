"""Prefix language modelling: read the beginning of a text both ways, predict the rest (arXiv:1910.10683, section 3.2).

a document       [5 6 7 8 2]      of which the first 2 tokens are the prefix; any number is, from one to all but one

encoder-decoder  source [5 6 2]   target [7 8 2]      as `_pairs` lays them out; a stored document ends with eos, here 2

decoder          tokens  [5 6 7 8 2]                  prefix  [1 1 0 0 0]: these see each other, whatever their order
                 labels  [6 7 8 2 0]                  weights [0 1 1 1 0]: what a token can see is not asked for
"""

from collections.abc import Mapping

import numpy as np

from jaxlm.data.words import Words
from jaxlm.objectives import _pairs, clm
from jaxlm.objectives._pairs import Sheet
from jaxlm.objectives._pairs import loss as loss

KINDS = ("encoder-decoder", "decoder")
EXACT = False


def row(length: int, words: Words, *, kind: str = "encoder-decoder") -> int:
    """Either side may be all but one token long; a decoder reads all but the last."""
    if kind == "decoder":
        return length + 1
    _pairs.eos(words)
    return length


def features(
    row: Mapping[str, np.ndarray], rng: np.random.Generator, words: Words, length: int, *,
    kind: str = "encoder-decoder",
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row -> an example, each document cut in two at a place of its own."""
    if kind == "decoder":
        return _both_ways(row, rng)
    sheet = Sheet(kind, length, length, words)
    for document in _pairs.shuffled(_pairs.documents(row, words), rng):
        most = sheet.cut(document, rng, _sizes)
        if len(most) > 1:
            at = int(rng.integers(1, len(most)))
            sheet.add(most[:at], most[at:])
    return sheet.example()


def _sizes(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Either side's length at most: all but one token, and eos."""
    tokens = np.arange(1, len(document) + 1)
    return tokens, tokens


def _both_ways(row: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    example = clm.features(row)
    prefix = np.zeros(len(row["tokens"]), np.int32)
    for segment in range(1, int(row["segments"].max()) + 1):
        first, *others = np.flatnonzero(row["segments"] == segment)
        if others:
            prefix[first : first + rng.integers(1, 1 + len(others))] = 1
    example["weights"] *= 1 - prefix[1:]
    return example | {"prefix": prefix[:-1]}
