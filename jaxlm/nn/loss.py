"""Cross-entropy and the output head as one step: the B x T x V logits never exist in full, forward or backward.

The gradient is computed along with the loss, chunk by chunk, while a chunk's logits are at hand; kept are only the
gradients of x [B, T, D] and of the head [V, D].
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.nn.linear import Head, flat

LOGITS_AT_ONCE = 2**24  # elements of one chunk's logits, unless told otherwise: 64 MiB in float32


class Sums(NamedTuple):
    """Sums over all tokens, each weighted: divide by `weight` for means per token (nats)."""

    loss: jax.Array  # what is minimised: nll with label smoothing, and the z-loss
    nll: jax.Array  # negative log-likelihood
    correct: jax.Array  # tokens whose label has the highest logit
    weight: jax.Array
    others: Mapping[str, tuple[jax.Array, jax.Array]] = {}  # further means, each as a sum and what to divide it by


@shaped
def cross_entropy(
    x_BTD: jax.Array, head: Head, labels_BT: jax.Array, weights_BT: jax.Array, *,
    label_smoothing: float = 0.0, z_loss: float = 0.0, chunk: int | None = None,
) -> Sums:  # fmt: skip
    """Sums of -log softmax(head(x))[label] over tokens, in float32; `chunk` tokens of each row at a time.

    Label smoothing spreads its share evenly over the vocabulary (arXiv:1512.00567, section 7); `z_loss` times the
    squared log-normaliser keeps logits from drifting (arXiv:2204.02311, section 5).
    """
    B, T, _ = x_BTD.shape
    V = head.table_VD.shape[0]
    parts = axes.ways(axes.splitting("T", "BTD", x_BTD.shape))  # of each row, on devices of their own
    some = LOGITS_AT_ONCE // (B * V) if chunk is None else chunk // parts
    T, some = T // parts, max(1, some)
    some = -(-T // -(-T // min(some, T)))  # as few chunks, as even as possible
    weights = weights_BT.astype(jnp.float32)
    loss, nll, correct = _summed(
        x_BTD, head.table_VD, head.bias_V, labels_BT, weights, head.cap, label_smoothing, z_loss, (parts, some)
    )
    return Sums(loss, nll, correct, weights.sum())


Cut = tuple[int, int]  # the parts of a row that lie on devices of their own, and how many tokens of each are a chunk


def _split(x: jax.Array, cut: Cut) -> jax.Array:
    """[B, T, ...] -> [chunks, B, tokens of a chunk, ...], padded with zeros (weight 0); each part has its share of each
    chunk.
    """
    (parts, chunk), (B, T, *D) = cut, x.shape
    x = x.reshape(B, parts, T // parts, *D)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), *((0, 0) for _ in D)))
    x = jnp.moveaxis(x.reshape(B, parts, -1, chunk, *D), 2, 0)
    return x.reshape(-1, B, parts * chunk, *D)


def _joined(x: jax.Array, cut: Cut, T: int) -> jax.Array:
    """[chunks, B, tokens of a chunk, D] -> [B, T, D]: the inverse."""
    (parts, chunk), (n, B, _, D) = cut, x.shape
    x = jnp.moveaxis(x.reshape(n, B, parts, chunk, D), 0, 2).reshape(B, parts, n * chunk, D)
    return axes.constrain(x[:, :, : T // parts].reshape(B, T, D), "BTD")


def _chunk_sums(x, head, labels, weights, smoothing, z_loss):
    """One chunk: the three sums, and what its gradient needs."""
    V = len(head.table_VD)
    labels, weights = (axes.constrain(a, "BT", V=V) for a in (labels, weights))
    logits = axes.constrain(head(axes.constrain(x, "BTD", V=V)), "BTV")
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = norm - picked
    loss = nll + z_loss * jnp.square(norm)
    if smoothing:
        loss = loss + smoothing * (picked - logits.mean(axis=-1))
    correct = (picked >= logits.max(axis=-1)) * weights
    return ((loss * weights).sum(), (nll * weights).sum(), correct.sum()), (logits, norm)


def _plain(x, table, bias, labels, weights, cap, smoothing, z_loss, cut):
    head = Head(table.astype(x.dtype), bias, cap)

    def add(sums, xs):
        return jax.tree.map(jnp.add, sums, _chunk_sums(xs[0], head, xs[1], xs[2], smoothing, z_loss)[0]), None

    xs = tuple(_split(a, cut) for a in (x, labels, weights))
    return jax.lax.scan(add, (jnp.zeros(()),) * 3, xs)[0]


def _forward(x, table, bias, labels, weights, cap, smoothing, z_loss, cut):
    cast, V = table.astype(x.dtype), table.shape[0]
    head = Head(cast, bias, cap)

    def add(carry, xs):
        sums, d_table, d_bias = carry
        x, labels, weights = xs
        new, (logits, norm) = _chunk_sums(x, head, labels, weights, smoothing, z_loss)
        d = jnp.exp(logits - norm[..., None]) * (1.0 + 2.0 * z_loss * norm)[..., None] - smoothing / V
        d = d - (1.0 - smoothing) * jax.nn.one_hot(labels, V, dtype=d.dtype)
        d = d * weights[..., None]
        if cap is not None:
            d = d * (1.0 - jnp.square(logits / cap))
        d_bias = None if bias is None else d_bias + d.sum(axis=(0, 1))
        d, rows = (a.reshape(*flat(a.shape[:2]), a.shape[2]) for a in (d.astype(x.dtype), x))
        new_table = d.T @ rows if d.ndim == 2 else jnp.einsum("btv,btd->vd", d, rows)
        d_table = d_table + new_table.astype(jnp.float32)
        return (jax.tree.map(jnp.add, sums, new), d_table, d_bias), (d @ cast).reshape(x.shape)

    xs = tuple(_split(a, cut) for a in (x, labels, weights))
    none = None if bias is None else jnp.zeros(V)
    start = ((jnp.zeros(()),) * 3, jnp.zeros(table.shape, jnp.float32), none)
    (sums, d_table, d_bias), d_x = jax.lax.scan(add, start, xs)
    return sums, (_joined(d_x, cut, x.shape[1]), d_table.astype(table.dtype), d_bias)


def _backward(cap, smoothing, z_loss, cut, kept, g):
    d_x, d_table, d_bias = (
        kept  # gradients of the loss sum; nll and the count of correct tokens are reports, not differentiated
    )
    d_bias = None if d_bias is None else d_bias * g[0]
    return (d_x * g[0]).astype(d_x.dtype), d_table * g[0].astype(d_table.dtype), d_bias, None, None


_summed = jax.custom_vjp(_plain, nondiff_argnums=(5, 6, 7, 8))
_summed.defvjp(_forward, _backward)
