"""What encoders have in front of the head that predicts masked tokens (as in the code of arXiv:1810.04805)."""

from flax import nnx
import jax

from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn.linear import dense, normal, zeros
from jaxlm.nn.mlp import GELU
from jaxlm.nn.norms import LayerNorm


class Dense(nnx.Module):
    """A square layer."""

    def __init__(self, width: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.w_DD, self.bias_D = normal(rngs, width, width, std=0.02), zeros(width) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(x, self.w_DD, self.bias_D)


@shaped
def transformed(x_BTD: jax.Array, transform: Dense | None, norm: LayerNorm | None) -> jax.Array:
    """What the head reads: hidden states through a layer, GELU and a norm. Raises `Mistake` where these are None."""
    if transform is None or norm is None:
        raise Mistake("this model has no head for masked tokens (config.model.masked=False)")
    return norm(GELU(transform(x_BTD)), x_BTD.dtype)
