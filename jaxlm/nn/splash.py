"""The TPU's splash attention kernel (Pallas): blocks of keys that nobody sees are never touched, memory linear in T.

A Pallas call cannot be split by the compiler, so each device runs it on its own rows and heads under `shard_map`.
"""

import functools
import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import axes, lookup
from jaxlm.nn.mask import Mask

LANES = 128  # the kernel's blocks are multiples of the TPU's vector width


def refuses(q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask) -> str | None:
    """Why the kernel cannot serve these [B, N, T, H] queries and [B, K, S, H] keys; None when it can."""
    if mask.offset_B is not None:
        return "queries must begin where the keys begin (no cache)"
    if q_shape[2] != k_shape[2] and (mask.causal or mask.window is not None):
        return "where order matters, queries must be the tokens that the keys are"
    return None


def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None) -> jax.Array:
    """Attention by the kernel: [B, N, T, H] in v's dtype. On anything but a TPU it runs interpreted (for tests).

    Raises `Mistake` with the reason where `refuses` has one.
    """
    reason = refuses(q_BNTH.shape, k_BKSH.shape, mask)
    if reason:
        raise lookup.Mistake(f"attention backend 'splash': {reason}; choose 'xla' or 'chunked'")
    B, _, T, H = q_BNTH.shape
    queries_BT = mask.segments_BT if mask.segments_BT is not None else jnp.ones((B, T), jnp.int32)
    keys_BS = mask.keys_BS
    if keys_BS is None:
        keys_BS = queries_BT if mask.segments_BT is not None else jnp.ones((B, k_BKSH.shape[2]), jnp.int32)
    elif mask.segments_BT is None:
        keys_BS = keys_BS > 0
    pad = lambda x, axis, fill=0: jnp.pad(  # noqa: E731
        x, [(0, -x.shape[i] % LANES if i == axis else 0) for i in range(x.ndim)], constant_values=fill
    )
    q, k, v = (pad(x, 2) for x in (q_BNTH * H**-0.5, k_BKSH, v_BKSH))
    segments = tuple(pad(x.astype(jnp.int32), 1, fill) for x, fill in ((queries_BT, -1), (keys_BS, -2)))  # nobody's

    def local(q, k, v, segments):
        shape = q.shape[2], k.shape[2]
        attention = _kernel(q.shape[1], shape, mask.causal, mask.window, cap, axes.platform() != "tpu")
        return jax.vmap(lambda q, k, v, s: attention(q, k, v, kernel.SegmentIds(*s)))(q, k, v, segments)

    place = axes.here()
    if place is not None and place[0].size > 1:
        mesh, rules = place
        heads = axes.spec("BKSH", k.shape, mesh, rules)  # K decides: a query head must sit with its key/value head
        rows = axes.spec("BT", segments[0].shape, mesh, rules)
        places = (heads, heads, heads, (rows, rows))
        local = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=heads, check_vma=False)
        q, k, v = (jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*heads))) for x in (q, k, v))
    return jnp.asarray(local(q, k, v, segments))[:, :, :T].astype(v_BKSH.dtype)


def _kernel(
    heads: int, shape: tuple[int, int], causal: bool, window: int | None, cap: float | None, interpret: bool
):  # fmt: skip
    """The compiled-in part: mask and block sizes for `heads` local heads of `shape` queries x keys."""
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    q, kv = (math.gcd(length, 512) for length in shape)
    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    make = functools.partial(kernel.make_splash_mha, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return make(mask=masks.MultiHeadMask([mask] * heads), attn_logits_soft_cap=cap, interpret=interpret)
