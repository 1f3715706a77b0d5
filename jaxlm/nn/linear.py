"""Weights, products with them, and dropout: what every layer is made of.

dense(x_BTD, w_DNH)            -> BTNH    tokens are flattened to one axis: one large product, which CPUs like best
dense(y_BTNH, w_NHD, axes=2)   -> BTD
"""

import dataclasses
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes


def normal(rngs: nnx.Rngs, *shape: int, std: float) -> nnx.Param:
    """A parameter drawn from a normal distribution of the given standard deviation, in float32."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * std)


def zeros(*shape: int) -> nnx.Param:
    """A parameter of zeros: biases."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def ones(*shape: int) -> nnx.Param:
    """A parameter of ones: norm scales."""
    return nnx.Param(jnp.ones(shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """A weight as a matrix [outer, inner] whose last axis is the one that a product contracts (`decode.weights`)."""

    matrix: jax.Array
    outer: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))  # the axes of the product's result


def dense(
    x: jax.Array, w: jax.Array | nnx.Param, bias: jax.Array | nnx.Param | None = None, axes: int = 1
) -> jax.Array:
    """Contract the last `axes` axes of x with the first ones of w, computed in x's dtype, and add the bias."""
    weight = w.get_value() if isinstance(w, nnx.Param) else w
    lead = x.shape[: x.ndim - axes]
    x = x.reshape(math.prod(lead), -1)
    if isinstance(weight, Turned):
        y, outer = _against_rows(x, weight.matrix), weight.outer
    else:
        y, outer = x @ weight.astype(x.dtype).reshape(x.shape[1], -1), weight.shape[axes:]
    if bias is not None:
        y = y + bias[...].astype(x.dtype).reshape(1, -1)
    return y.reshape(*lead, *outer)


class Head(NamedTuple):
    """What turns hidden states into logits: a row a token, perhaps a bias, perhaps bent to cap tanh(logit / cap)."""

    table_VD: jax.Array
    bias_V: jax.Array | None = None
    cap: float | None = None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32."""
        B, T, D = x_BTD.shape
        y = _against_rows(x_BTD.reshape(B * T, D), self.table_VD).astype(jnp.float32)
        if self.bias_V is not None:
            y = y + self.bias_V[None]
        return (y if self.cap is None else self.cap * jnp.tanh(y / self.cap)).reshape(B, T, -1)


def _against_rows(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[tokens, inner], [outer, inner] -> [tokens, outer]; said so, and not with a transpose, XLA copies nothing."""
    return jax.lax.dot_general(x, matrix.astype(x.dtype), (((1,), (1,)), ((), ())))


def embed(table_VD: jax.Array | nnx.Param, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table: [B, T, D]. The table is gathered along D first, where it is split, since B takes those mesh
    axes.
    """
    return axes.constrain(axes.constrain(table_VD[...], "V_")[tokens_BT], "BTD")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up (JMLR 15:1929); without a key, or at rate 0, x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
