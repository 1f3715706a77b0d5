"""Mixing: a new document out of two, the text and another one of the training texts near it.

    mix(how="concatenate")    A1 A2 A3 and B1 B2     A1 A2 A3 ¶ B1 B2       a document that changes its subject
    mix(how="interleave")                            A1 B1 A2 B2 A3         sentences by turns

The other text is drawn from the batch that the text is prepared in (256 kB of the same source).
"""

import itertools

import numpy as np

from jaxlm import lookup
from jaxlm.data import augmentation
from jaxlm.data.augmentation import sentences


def rule(*, how: str = "concatenate", separator: str = "\n\n") -> augmentation.Rule:
    """Concatenate two texts with a `separator` between them, or interleave their sentences."""
    join = lookup.key("mix: how", how, dict(concatenate=separator.join, interleave=_interleave))

    def mix(texts: list[str], rngs: list[np.random.Generator], copies: int) -> list[list[str]]:
        others = [rng.integers(len(texts), size=copies).tolist() for rng in rngs]
        return [[join([text, texts[i]]) for i in chosen if texts[i] != text] for text, chosen in zip(texts, others)]

    return mix


def _interleave(both: list[str]) -> str:
    turns = itertools.zip_longest(*map(sentences, both), fillvalue="")
    pieces = [piece for turn in turns for piece in turn if piece]
    return "".join(piece if piece[-1].isspace() else f"{piece} " for piece in pieces[:-1]) + pieces[-1]
