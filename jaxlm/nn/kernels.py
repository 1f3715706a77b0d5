"""What attention kernels written in Pallas have in common: whole blocks of tokens, and each device at its own rows.

run(local, q_BNTH, k_BKSH, v_BKSH, mask, block=128)      `local` sees one device's part, and lengths that blocks divide
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import axes
from jaxlm.nn.mask import Mask

Local = Callable[[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array]], Any]  # an array, in truth


def refuses(q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask, biased: bool) -> str | None:
    """Why no kernel can serve these [B, N, T, H] queries and [B, K, S, H] keys; None when one may."""
    if biased:
        return "it adds no bias to scores"
    if mask.prefix_BT is not None:
        return "it has no prefix that is seen from before"
    if mask.offset_B is not None:
        return "queries must begin where the keys begin (no cache)"
    if q_shape[2] != k_shape[2] and (mask.causal or mask.window is not None):
        return "where order matters, queries must be the tokens that the keys are"
    return None


def run(local: Local, q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, block: int) -> jax.Array:
    """`local(q, k, v, (segments of q, segments of k))` on every device: [B, N, T, H] in v's dtype.

    T and S are padded to multiples of `block`, with tokens of a segment that no real one has. A Pallas call cannot be
    split by the compiler, so each device runs it on its own rows and heads under `shard_map`.
    """
    pad = lambda x, axis, fill=0: jnp.pad(  # noqa: E731
        x, [(0, -x.shape[i] % block if i == axis else 0) for i in range(x.ndim)], constant_values=fill
    )
    B, _, T, _ = q_BNTH.shape
    queries_BT, keys_BS = _segments(mask, B, T, k_BKSH.shape[2])
    q, k, v = (pad(x, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
    segments = pad(queries_BT.astype(jnp.int32), 1, -1), pad(keys_BS.astype(jnp.int32), 1, -2)
    place = axes.here()
    if place is not None and place[0].size > 1:
        mesh, rules = place
        heads = axes.spec("BKSH", k.shape, mesh, rules)  # K decides: a query head must sit with its key/value head
        rows = axes.spec("B_", segments[0].shape, mesh, rules)
        places = (heads, heads, heads, (rows, rows))
        local = jax.shard_map(local, in_specs=places, out_specs=heads, axis_names=axes.free(), check_vma=False)
        q, k, v = (jax.lax.with_sharding_constraint(x, PartitionSpec(*heads)) for x in (q, k, v))
    return jnp.asarray(local(q, k, v, segments))[:, :, :T].astype(v_BKSH.dtype)


def _segments(mask: Mask, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Numbers [B, T] and [B, S]: a query sees the keys that have its own."""
    if mask.segments_BT is not None:
        return mask.segments_BT, mask.segments_BT if mask.keys_BS is None else mask.keys_BS
    keys_BS = jnp.ones((B, S), jnp.int32) if mask.keys_BS is None else mask.keys_BS > 0
    return jnp.ones((B, T), jnp.int32), keys_BS
