"""Normalisation over the model width, in float32 whatever comes in; the result has the dtype that the layer computes
in.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm.axes import shaped
from jaxlm.nn.linear import ones, zeros


class RMSNorm(nnx.Module):
    """Divide by the root mean square (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.scale_D, self.eps = ones(width), eps

    @shaped
    def __call__(self, x_BTD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale_D[...][None, None]).astype(dtype)


class LayerNorm(nnx.Module):
    """Subtract the mean, divide by the standard deviation (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        self.scale_D, self.bias_D, self.eps = ones(width), zeros(width), eps

    @shaped
    def __call__(self, x_BTD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale_D[...][None, None] + self.bias_D[...][None, None]).astype(dtype)
