"""Normalisation over the model width, in float32 whatever comes in; the result has the dtype that the layer computes
in.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm.axes import shaped
from jaxlm.nn.linear import ones, zeros


class RMSNorm(nnx.Module):
    """Divide by the root mean square (arXiv:1910.07467); `offset` 1 keeps the scale as its difference from 1."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        self.scale_D, self.eps, self.offset = (zeros if offset else ones)(width), eps, offset

    @shaped
    def __call__(self, x_BTD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * (self.offset + self.scale_D[...])[None, None]).astype(dtype)


class HeadNorm(nnx.Module):
    """RMSNorm of each head's queries or keys, one scale for all heads (arXiv:2010.04245, as in Qwen3)."""

    def __init__(self, head_width: int, eps: float, offset: float = 0.0):
        self.scale_H, self.eps, self.offset = (zeros if offset else ones)(head_width), eps, offset

    @shaped
    def __call__(self, x_BNTH: jax.Array) -> jax.Array:
        x = x_BNTH.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * (self.offset + self.scale_H[...])[None, None, None]).astype(x_BNTH.dtype)


class LayerNorm(nnx.Module):
    """Subtract the mean, divide by the standard deviation (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float, bias: bool = True):
        self.scale_D, self.bias_D, self.eps = ones(width), zeros(width) if bias else None, eps

    @shaped
    def __call__(self, x_BTD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        x = x * self.scale_D[...][None, None]
        return (x if self.bias_D is None else x + self.bias_D[...][None, None]).astype(dtype)
