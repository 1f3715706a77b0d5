"""Weights, products with them, and dropout: what every layer is made of.

dense(x_BTD, w_DNH)            -> BTNH    tokens are flattened to one axis: one large product, which CPUs like best
dense(y_BTNH, w_NHD, axes=2)   -> BTD
"""

import math

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


def dense(
    x: jax.Array, w: jax.Array | nnx.Param, bias: jax.Array | nnx.Param | None = None, axes: int = 1
) -> jax.Array:
    """Contract the last `axes` axes of x with the first ones of w, computed in x's dtype, and add the bias."""
    w = w[...].astype(x.dtype)
    lead, inner, outer = x.shape[: x.ndim - axes], w.shape[:axes], w.shape[axes:]
    y = x.reshape(math.prod(lead), math.prod(inner)) @ w.reshape(math.prod(inner), math.prod(outer))
    if bias is not None:
        y = y + bias[...].astype(x.dtype).reshape(1, -1)
    return y.reshape(*lead, *outer)


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
