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
    if mask.offset_B is not None or mask.keys_BS is not None or q_shape[2] != k_shape[2]:
        return "queries must be the tokens that the keys are, and begin where they begin (no cache)"
    return None


def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None) -> jax.Array:
    """Attention by the kernel: [B, N, T, H] in v's dtype. On anything but a TPU it runs interpreted (for tests).

    Raises `Mistake` with the reason where `refuses` has one.
    """
    reason = refuses(q_BNTH.shape, k_BKSH.shape, mask)
    if reason:
        raise lookup.Mistake(f"attention backend 'splash': {reason}; choose 'xla' or 'chunked'")
    B, _, T, H = q_BNTH.shape
    segments_BT = mask.segments_BT if mask.segments_BT is not None else jnp.ones((B, T), jnp.int32)
    pad = -T % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q_BNTH * H**-0.5, k_BKSH, v_BKSH))
    segments = jnp.pad(segments_BT.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-1)  # nobody's

    def local(q, k, v, segments):
        attention = _kernel(q.shape[1], T + pad, mask.causal, mask.window, cap, axes.platform() != "tpu")
        return jax.vmap(lambda q, k, v, s: attention(q, k, v, kernel.SegmentIds(s, s)))(q, k, v, segments)

    place = axes.here()
    if place is not None and place[0].size > 1:
        mesh, rules = place
        heads = axes.spec("BKSH", k.shape, mesh, rules)  # K decides: a query head must sit with its key/value head
        rows = axes.spec("BT", segments.shape, mesh, rules)
        local = jax.shard_map(local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        q, k, v = (jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*heads))) for x in (q, k, v))
    return jnp.asarray(local(q, k, v, segments))[:, :, :T].astype(v_BKSH.dtype)


def _kernel(heads: int, length: int, causal: bool, window: int | None, cap: float | None, interpret: bool):
    """The compiled-in part: mask and block sizes for `heads` local heads."""
    shape = (length, length)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block = math.gcd(length, 512)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    make = functools.partial(kernel.make_splash_mha, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return make(mask=masks.MultiHeadMask([mask] * heads), attn_logits_soft_cap=cap, interpret=interpret)
