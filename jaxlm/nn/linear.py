"""Weights, products with them, and dropout: what every layer is made of.

dense(x_BTD, w_DNH)            -> BTNH    on a CPU tokens are flattened to one axis: one large product, its favourite
dense(y_BTNH, w_NHD, over=2)   -> BTD
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

from flax import nnx
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from jaxlm import axes
from jaxlm.nn import native


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiled:
    """A bfloat16 weight as a CPU's own kernel reads it while decoding (`native.tile`)."""

    tiles: jax.Array
    outer: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))


Weight: TypeAlias = jax.Array | nnx.Param | Turned | Tiled


def dense(x: jax.Array, w: Weight, bias: Weight | None = None, over: int = 1) -> jax.Array:
    """Contract the last `over` axes of x with the first ones of w, computed in x's dtype, and add the bias."""
    weight = _value(w)
    lead = x.shape[: x.ndim - over]
    matrix = x.reshape(*flat(lead), -1)
    if isinstance(weight, Tiled):
        y, outer = native.product(matrix, weight.tiles, math.prod(weight.outer)), weight.outer
    elif isinstance(weight, Turned):
        y, outer = _against_rows(matrix, weight.matrix), weight.outer
    elif axes.platform() == "cpu":
        y, outer = _product(matrix, weight.reshape(matrix.shape[-1], -1)), weight.shape[over:]
    else:  # a TPU's compiler then chooses layouts that need no copies: a Llama's step takes 7 % less
        y, outer = jnp.tensordot(x, weight.astype(x.dtype), over), weight.shape[over:]
        if lead[-1] != 1:  # of a single token they stay apart, or a bias would have the weight turned for it
            y = y.reshape(*lead, -1)
    if bias is not None:  # rounded, if at all, once it is spread, so that its gradient is summed in float32
        row = _value(bias).reshape(outer if y.ndim == len(lead) + len(outer) else -1)
        y = y + jnp.broadcast_to(jnp.expand_dims(row, range(y.ndim - row.ndim)), y.shape).astype(y.dtype)
    return y.astype(x.dtype).reshape(*lead, *outer)


def flat(lead: tuple[int, ...]) -> tuple[int, ...]:
    """B x T as one axis; as they are where devices split T, since that one axis could not be split so."""
    return lead if len(lead) == 2 and axes.splitting("T", "BT", lead) else (math.prod(lead),)


class Head(NamedTuple):
    """What turns hidden states into logits: a row a token, perhaps a bias, perhaps bent to cap tanh(logit / cap)."""

    table_VD: Any  # an array, or while decoding perhaps Turned or Tiled
    bias_V: jax.Array | None = None
    cap: float | None = None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32."""
        B, T, D = x_BTD.shape
        table, x = self.table_VD, x_BTD.reshape(*flat((B, T)), D)
        if isinstance(table, Tiled):
            y = native.product(x, table.tiles, *table.outer)
        else:
            y = _against_rows(x, table.matrix if isinstance(table, Turned) else table).astype(jnp.float32)
        if self.bias_V is not None:
            y = y + jnp.expand_dims(self.bias_V, range(y.ndim - 1))
        return (y if self.cap is None else self.cap * jnp.tanh(y / self.cap)).reshape(B, T, -1)


def _value(w: Weight) -> Any:
    return w.get_value() if isinstance(w, nnx.Param) else w


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """[tokens, inner], [inner, outer] -> [tokens, outer] in x's dtype; in float32 of a CPU's fast bfloat16s."""
    half = x.dtype == jnp.bfloat16 and x.ndim == 2 and axes.platform() == "cpu"
    return _half_product(x, w) if half else x @ w.astype(x.dtype)


@jax.custom_vjp
def _half_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of bfloat16s as a CPU is fast at it: with a result in float32, forward and back. The gradient of x is
    rounded, that of w is not.
    """
    return _summed(x, w.astype(x.dtype), 1, 0)


def _half_forward(x: jax.Array, w: jax.Array):
    half = w.astype(x.dtype)
    return _summed(x, half, 1, 0), (x, half)


def _half_backward(kept, d: jax.Array):
    x, half = kept
    d = d.astype(x.dtype)
    return _summed(d, half, 1, 1).astype(x.dtype), crossed(x, d)


_half_product.defvjp(_half_forward, _half_backward)


def crossed(a: jax.Array, b: jax.Array) -> jax.Array:
    """[.., tokens, M], [.., tokens, N] -> [.., M, N] in float32, a' b: what gradients of weights, keys and values are.

    A CPU's fast products of bfloat16s contract the last axis of the first, so `a` is turned in memory; a mere transpose
    XLA would make a part of the product again. Devices that split the work each would gather all of `a` for that.
    """
    if a.dtype == jnp.bfloat16 and axes.platform() == "cpu" and axes.alone():
        a = with_layout_constraint(a.swapaxes(-1, -2), Layout(tuple(range(a.ndim))))
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return jnp.einsum("...tm,...tn->...mn", a, b, preferred_element_type=jnp.float32)


def _summed(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _against_rows(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[tokens, inner], [outer, inner] -> [tokens, outer]; said so, and not with a transpose, XLA copies nothing."""
    if x.dtype != jnp.bfloat16 or axes.platform() != "cpu":
        return jax.lax.dot_general(x, matrix.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    rows = (
        jnp.concatenate([x, x]) if len(x) == 1 else x
    )  # a single row is a vector to XLA, which has no fast way for it
    return _summed(rows, matrix.astype(x.dtype), x.ndim - 1, 1)[: len(x)]


def stream(dtype: Any) -> jnp.dtype:
    """What the residual stream is kept in by a model that computes in `dtype`, and what an activation is computed in:
    float32 on a CPU, which is faster at it; `dtype` elsewhere, where that halves what a layer reads, writes and keeps
    for the backward pass.
    """
    return jnp.dtype("float32" if axes.platform() == "cpu" else dtype)


def embed(table_VD: jax.Array | nnx.Param, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table: [B, T, D], the residual stream of a model that computes in `dtype`. The table is gathered along
    D first, where it is split, since B takes those mesh axes; along V it stays as it is, and what each part finds is
    summed. Rows are rounded once they are found, so that the gradients of all places of a token are summed in float32.
    """
    table = axes.constrain(table_VD[...], "V_")
    x_BTD = table[tokens_BT].astype(stream(dtype))
    return axes.constrain(axes.constrain(x_BTD, "BTD", V=len(table)), "BTD")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up (JMLR 15:1929); without a key, or at rate 0, x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
