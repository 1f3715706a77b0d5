"""The GPU's flash attention kernel (Pallas, compiled by Triton): memory linear in T, forward and backward.

It is JAX's own, `jax.experimental.pallas.ops.gpu.attention`, since that honours segments, is there for every JAX that
jaxlm runs on, and runs interpreted on a CPU, so that tests hold its numbers to the reference without a GPU. The others:

cuDNN       `jax.nn.dot_product_attention` shows its lengths, not its segment offsets; a mask of segments is B T S large
tokamax     asks for JAX 0.11 and Python 3.12; its public mask is B T S booleans, ranges of keys are internal

JAX 0.12 warns that tokamax will take the place of its kernel; it is imported when it is asked for.
"""

import importlib.util

import jax
import jax.numpy as jnp

from jaxlm import axes
from jaxlm.nn import kernels
from jaxlm.nn.mask import Mask

PLATFORM = "gpu"
SOURCE = "jax.experimental.pallas.ops.gpu"
BYTES = 128  # of one channel of the tokens in a block: 64 in bfloat16, which the smallest GPUs' shared memory holds
NARROW, WIDE = 16, 128  # heads: a tensor core's smallest tile; the widest that JAX tests on GPUs


def refuses(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask, cap: float | None, biased: bool
) -> str | None:  # fmt: skip
    """Why the kernel cannot serve these [B, N, T, H] queries and [B, K, S, H] keys; None when it can."""
    if q_shape[2] != k_shape[2] or mask.keys_BS is not None:
        return "queries must be the tokens that the keys are"
    if cap is not None:
        return "it does not cap scores"
    if mask.window is not None and mask.window < k_shape[2]:
        return "it has no sliding window"
    if q_shape[3] > WIDE:
        return f"heads are {q_shape[3]} wide, and its tiles hold {WIDE}"
    if str(getattr(axes.device(), "compute_capability", "")).startswith(("5.", "6.", "7.")):
        return "it needs a GPU of compute capability 8.0 or newer"
    if importlib.util.find_spec(f"{SOURCE}.attention") is None:
        return "this JAX has it no more"
    return kernels.refuses(q_shape, k_shape, mask, biased)


def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None) -> jax.Array:
    """Attention by the kernel: [B, N, T, H] in v's dtype. On anything but a GPU it runs interpreted (for tests)."""
    kernel = importlib.import_module(f"{SOURCE}.attention")
    H, block = q_BNTH.shape[-1], BYTES // q_BNTH.dtype.itemsize
    sizes = kernel.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def local(q, k, v, segments):
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        wide = [(0, 0)] * 3 + [(0, max(NARROW - H, 0))]
        q, k, v = (jnp.pad(x.transpose(0, 2, 1, 3), wide) for x in (q, k, v))
        out = kernel.mha(
            q, k, v, segments[0], sm_scale=H**-0.5, causal=mask.causal, block_sizes=sizes,
            interpret=axes.platform() != PLATFORM,
        )  # fmt: skip
        return out.transpose(0, 2, 1, 3)[..., :H]

    return kernels.run(local, q_BNTH, k_BKSH, v_BKSH, mask, block)
