"""Causal modelling of tokens of which a tenth is drawn at random: an objective with noise, for the tests."""

import numpy as np

from jaxlm.objectives import clm

KINDS, EXACT = ("decoder",), False
row, loss = clm.row, clm.loss


def features(row, rng, words, length):
    """As clm, the tokens spoilt."""
    example = clm.features(row)
    spoilt = rng.random(length) < 0.1
    return example | {
        "tokens": np.where(spoilt, rng.integers(3, words.vocab, length), example["tokens"]).astype(np.int32)
    }
