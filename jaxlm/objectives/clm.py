"""Causal language modelling: predict each token from the ones before it in its document.

row                tokens    [1 5 6 2 1 7 2 0 0]     features   tokens    [1 5 6 2 1 7 2 0]
                   segments  [1 1 1 1 2 2 2 0 0]                labels    [5 6 2 1 7 2 0 0]
                                                                weights   [1 1 1 0 1 1 0 0]
                                                                segments  [1 1 1 1 2 2 2 0]
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.nn.loss import Sums, cross_entropy

KINDS = ("decoder",)  # a model that sees both sides would read off what it has to predict
EXACT = True


def row(length: int, *_: object) -> int:
    """One token more than the model reads."""
    return length + 1


def features(row: Mapping[str, np.ndarray], *_: object) -> dict[str, np.ndarray]:
    """A packed row of length T+1 -> the model's example of length T; the last token of a document predicts nothing."""
    tokens, segments = row["tokens"], row["segments"]
    real = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return {
        "tokens": tokens[:-1].astype(np.int32),
        "labels": tokens[1:].astype(np.int32),
        "weights": real.astype(np.float32),
        "segments": segments[:-1].astype(np.int32),
    }


def loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Sums:
    """Sums over the batch's real tokens (nats); divide by `.weight` for the mean. Without a key: no dropout.

    The options are those of `jaxlm.nn.loss.cross_entropy`.
    """
    segments_BT = batch.get("segments")  # left out where one document fills every row
    where, added = dict(segments_BT=segments_BT, key=key), 0.0
    if "prefix" in batch:  # tokens that their document reads both ways
        where["prefix_BT"] = batch["prefix"]
    if hasattr(model, "routed"):  # a mixture of experts has terms of its own, a mean over tokens
        x_BTD, _, added = model.routed(batch["tokens"], **where)
    else:
        x_BTD, _ = model.hidden(batch["tokens"], **where)
    sums = cross_entropy(
        x_BTD, model.head, batch["labels"], batch["weights"],
        label_smoothing=label_smoothing, z_loss=z_loss, chunk=chunk,
    )  # fmt: skip
    return sums._replace(loss=sums.loss + added * sums.weight)
