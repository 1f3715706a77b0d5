"""The TPU's splash attention kernel (Pallas): blocks of keys that nobody sees are never touched, memory linear in T.

It is imported when it is asked for: Pallas takes a moment, which every program on a CPU or a GPU would wait for.
"""

import functools
import math

import jax
import numpy as np

from jaxlm import axes
from jaxlm.nn import kernels
from jaxlm.nn.mask import Mask

PLATFORM = "tpu"
LANES = 128  # the kernel's blocks are multiples of the TPU's vector width
BLOCK = 1024  # queries and keys at a time, at most


def refuses(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask, cap: float | None, biased: bool
) -> str | None:  # fmt: skip
    """Why the kernel cannot serve these [B, N, T, H] queries and [B, K, S, H] keys; None when it can."""
    return kernels.refuses(q_shape, k_shape, mask, biased)


def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None) -> jax.Array:
    """Attention by the kernel: [B, N, T, H] in v's dtype. On anything but a TPU it runs interpreted (for tests)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    def local(q, k, v, segments):
        shape = q.shape[2], k.shape[2]
        attention = _kernel(q.shape[1], shape, mask.causal, mask.window, cap, axes.platform() != PLATFORM)
        with jax.named_scope(f"seen_{seen(*shape, mask.causal, mask.window):.4f}"):  # `jaxlm plan` reads it
            return jax.vmap(lambda q, k, v, s: attention(q, k, v, kernel.SegmentIds(*s)))(q, k, v, segments)

    return kernels.run(local, q_BNTH * q_BNTH.shape[-1] ** -0.5, k_BKSH, v_BKSH, mask, LANES)


def seen(queries: int, keys: int, causal: bool, window: int | None) -> float:
    """The share of the scores that the kernel computes: of the blocks that any query may see at all."""
    q, kv = (math.gcd(length, BLOCK) for length in (queries, keys))
    first, begin = np.arange(0, queries, q)[:, None], np.arange(0, keys, kv)
    blocks = (begin < first + q) if causal else np.ones((queries // q, keys // kv), bool)
    if window is not None:
        blocks = blocks & (begin + kv > first - window + 1) & (causal or begin < first + q + window - 1)
    return float(blocks.mean())


def _kernel(
    heads: int, shape: tuple[int, int], causal: bool, window: int | None, cap: float | None, interpret: bool
):  # fmt: skip
    """The compiled-in part: mask and block sizes for `heads` local heads of `shape` queries x keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    q, kv = (math.gcd(length, BLOCK) for length in shape)
    few = shape[1] <= 2 * kv  # the fused kernel writes the queries' gradient once for each block of keys
    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=math.gcd(kv, 512), block_q_dkv=q, block_kv_dkv=kv,
        block_kv_dkv_compute=math.gcd(kv, 512), block_q_dq=None if few else q, block_kv_dq=None if few else kv,
        use_fused_bwd_kernel=few,
    )  # fmt: skip
    make = functools.partial(kernel.make_splash_mha, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return make(mask=masks.MultiHeadMask([mask] * heads), attn_logits_soft_cap=cap, interpret=interpret)
