"""Attention over tokens that lie on several devices gives what one device gives, and sends around what it says."""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.lookup import Mistake
from jaxlm.nn import context
from jaxlm.nn.attention import Mask, attend
from jaxlm.nn.positions import RelativeBias
from tests.nn.test_attention import by_hand

B, N, K, T, H = 2, 4, 2, 32, 8
SEGMENTS = jnp.asarray([[1] * 13 + [2] * 15 + [3] * 4, [1] * 25 + [0] * 7])
PREFIX = jnp.asarray([[1] * 9 + [0] * 23, [1] * 25 + [0] * 7])
MASKS = {
    "causal": Mask(),
    "segments": Mask(segments_BT=SEGMENTS),
    "window": Mask(window=7),
    "wide window and segments": Mask(window=19, segments_BT=SEGMENTS),
    "prefix": Mask(prefix_BT=PREFIX),
    "prefix, window and segments": Mask(prefix_BT=PREFIX, window=7, segments_BT=SEGMENTS),
    "both sides": Mask(causal=False),
    "both sides, window and segments": Mask(causal=False, window=7, segments_BT=SEGMENTS),
    "others": Mask(causal=False, segments_BT=SEGMENTS, keys_BS=SEGMENTS[:, ::-1]),
}
MESHES = {"sequence=4": dict(data=2, sequence=4), "all": dict(fsdp=2, sequence=2, tensor=2)}


def inputs(length=T):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    return draw(0, B, N, length, H), draw(1, B, K, length, H), draw(2, B, K, length, H)


def both(mask, way, qkv, **more):
    """What comes out, and the gradients of a weighted sum of it."""
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def run(*qkv):
        out = attend(*qkv, mask, way, **more)
        return (out * weight).sum(), out

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*qkv)


def close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(context, "CHUNK", 4)  # so that there are several


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", context.WAYS)
def test_split_tokens_attend_as_whole_rows_do(way, mask, mesh):
    (_, want), want_grads = both(MASKS[mask], "xla", inputs())
    with axes.on(axes.mesh(**MESHES[mesh])):
        (_, got), grads = both(MASKS[mask], way, inputs())
    seen = np.ones((B, T), bool)
    if mask == "others":
        seen = (np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None, ::-1]).any(-1)
    close(np.where(seen[:, None, :, None], got, 0), np.where(seen[:, None, :, None], want, 0))
    if mask != "others":
        close(grads, want_grads)
