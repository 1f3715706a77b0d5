"""Cross-entropy and the output head as one step: the B x T x V logits never exist in full, forward or backward.

The gradient is computed along with the loss, chunk by chunk, while a chunk's logits are at hand; kept are only the
gradients of x [B, T, D] and of the head [V, D]. On a mesh each device goes through its own tokens, with the head
gathered once before them and its gradient summed over the devices once behind them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import axes, lookup
from jaxlm.axes import shaped
from jaxlm.nn.linear import Head, crossed, stream

LOGITS_AT_ONCE = 2**25  # elements of one chunk's logits on a device, unless told otherwise: 128 MiB in float32
ACCELERATED = 2**28  # the same on a TPU or GPU, where each chunk also reads and writes the head's gradient


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
    squared log-normaliser keeps logits from drifting (arXiv:2204.02311, section 5). Raises `Mistake` for shares
    outside 0 to 1 and weights below 0.
    """
    lookup.within("config.objective.", 0, 1, label_smoothing=label_smoothing)
    lookup.within("config.objective.", 0, z_loss=z_loss)
    if chunk is None:
        chunk = tokens_at_once(len(x_BTD), len(head.table_VD))
    weights = weights_BT.astype(jnp.float32)
    loss, nll, correct = _summed(
        x_BTD, head.table_VD, head.bias_V, labels_BT, weights, head.cap, label_smoothing, z_loss, chunk
    )
    return Sums(loss, nll, correct, weights.sum())


def tokens_at_once(rows: int, vocab: int) -> int:
    """How many tokens of each of so many rows have their logits in memory together, by what a device has of both."""
    rows, vocab = (n // axes.ways(axes.splitting(axis, axis, (n,))) for axis, n in (("B", rows), ("V", vocab)))
    if axes.platform() == "cpu":
        return max(1, LOGITS_AT_ONCE // (rows * vocab))
    return 1 << max(7, (ACCELERATED // (rows * vocab)).bit_length() - 1)  # what is no power takes minutes to compile


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, tokens, ...], padded with zeros (weight 0): as few chunks as can be, and even."""
    T = x.shape[1]
    chunk = -(-T // -(-T // min(chunk, T)))
    x = jnp.pad(x, ((0, 0), (0, -T % chunk), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _chunk_sums(x, head, labels, weights, smoothing, z_loss):
    """One chunk: the three sums, and what its gradient needs."""
    logits = axes.constrain(head(x), "BTV")
    norm, share = _softmax(logits)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = norm - picked
    loss = nll + z_loss * jnp.square(norm)
    if smoothing:
        loss = loss + smoothing * (picked - logits.mean(axis=-1))
    correct = (picked >= logits.max(axis=-1)) * weights
    return ((loss * weights).sum(), (nll * weights).sum(), correct.sum()), (logits, norm, share)


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-normaliser [B, T] and each word's share [B, T, V]."""
    if axes.platform() != "cpu":
        norm = jax.nn.logsumexp(logits, axis=-1)
        return norm, jnp.exp(logits - norm[..., None])
    top = logits.max(axis=-1)  # a CPU takes longer for exponentials than to keep them, thrice as long within a sum
    power = jnp.exp(logits - top[..., None])
    total = power @ jnp.ones(logits.shape[-1])
    return top + jnp.log(total), power / total[..., None]


def _plain(x, table, bias, labels, weights, cap, smoothing, z_loss, chunk):
    def local(x, table, bias, labels, weights):
        head = Head(table, bias, cap)

        def add(sums, xs):
            return jax.tree.map(jnp.add, sums, _chunk_sums(xs[0], head, xs[1], xs[2], smoothing, z_loss)[0]), None

        xs = tuple(_split(a, chunk) for a in (x, labels, weights))
        return jax.lax.scan(add, (jnp.zeros(()),) * 3, xs)[0], None

    return _each_its_own(local, x, table, bias, labels, weights, gradient=False)[0]


def _forward(x, table, bias, labels, weights, cap, smoothing, z_loss, chunk):
    V = table.shape[0]

    def local(x, table, bias, labels, weights):
        head = Head(table, bias, cap)

        def add(carry, xs):
            sums, d_table, d_bias = carry
            x, labels, weights = xs
            new, (logits, norm, share) = _chunk_sums(x, head, labels, weights, smoothing, z_loss)
            d = share * (1.0 + 2.0 * z_loss * norm)[..., None] - smoothing / V
            d = d - (1.0 - smoothing) * jax.nn.one_hot(labels, V, dtype=d.dtype)
            d = d * weights[..., None]
            if cap is not None:
                d = d * (1.0 - jnp.square(logits / cap))
            d_bias = None if bias is None else d_bias + d.sum(axis=(0, 1))
            d = d.astype(x.dtype).reshape(-1, V)
            d_table = d_table + crossed(d, x.reshape(-1, x.shape[-1]))
            d_x = jnp.matmul(d, table, preferred_element_type=stream(x.dtype)).astype(x.dtype)
            return (jax.tree.map(jnp.add, sums, new), d_table, d_bias), d_x.reshape(x.shape)

        xs = tuple(_split(a, chunk) for a in (x, labels, weights))
        start = ((jnp.zeros(()),) * 3, jnp.zeros(table.shape, jnp.float32), None if bias is None else jnp.zeros(V))
        (sums, d_table, d_bias), d_x = jax.lax.scan(add, start, xs)
        d_x = d_x.swapaxes(0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
        return sums, (d_x, d_table, d_bias)

    sums, (d_x, d_table, d_bias) = _each_its_own(local, x, table, bias, labels, weights, gradient=True)
    return sums, (d_x, d_table.astype(table.dtype), d_bias)


def _each_its_own(local: Callable, x, table, bias, labels, weights, *, gradient: bool) -> Any:
    """`local` of each device's tokens and the whole head, cast to x's dtype: the sums and, with the `gradient`, those
    of x, the head and its bias, the last two summed over the devices that have other tokens.

    Left to itself the compiler would sum that gradient over the devices once a chunk.
    """
    cast, place = table.astype(x.dtype), axes.here()
    if place is None:
        return local(x, cast, bias, labels, weights)
    b, t, _ = axes.spec("BTV", (*x.shape[:2], len(table)), *place)
    others = (*axes.names(b), *axes.names(t))
    if not others:
        return local(x, cast, bias, labels, weights)
    home = axes.names(axes.spec("VD", table.shape, *place)[1])
    along = tuple(name for name in home if name in others)  # what splits D of the table, and tokens here
    tokens, whole = PartitionSpec(b, t), PartitionSpec()

    def summed(*args):
        sums, gradients = local(*args)
        sums = jax.lax.psum(sums, others)
        if gradients is None:
            return sums, None
        d_x, d_table, d_bias = gradients
        for name in along:  # one after the other: what goes to other slices is then small, and cut as it is kept
            d_table = jax.lax.psum_scatter(d_table, name, scatter_dimension=1, tiled=True)
        rest = tuple(name for name in others if name not in along)
        d_table = jax.lax.psum(d_table, rest) if rest else d_table
        # summed before the layers' backward pass begins, or the whole of it would be held until that ends
        d_x, d_table = jax.lax.optimization_barrier((d_x, d_table))
        return sums, (d_x, d_table, None if d_bias is None else jax.lax.psum(d_bias, others))

    ins = (tokens, whole, whole, tokens, tokens)
    outs = (whole, (tokens, PartitionSpec(None, along or None), whole) if gradient else None)
    return jax.shard_map(
        summed, mesh=place[0], in_specs=ins, out_specs=outs, axis_names=set(others), check_vma=False
    )(x, cast, bias, labels, weights)  # fmt: skip


def _backward(cap, smoothing, z_loss, chunk, kept, g):
    d_x, d_table, d_bias = (
        kept  # gradients of the loss sum; nll and the count of correct tokens are reports, not differentiated
    )
    d_bias = None if d_bias is None else d_bias * g[0]
    return (d_x * g[0]).astype(d_x.dtype), d_table * g[0].astype(d_table.dtype), d_bias, None, None


_summed = jax.custom_vjp(_plain, nondiff_argnums=(5, 6, 7, 8))
_summed.defvjp(_forward, _backward)
