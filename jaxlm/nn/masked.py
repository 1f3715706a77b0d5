"""What encoders have in front of the head that predicts masked tokens (as in the code of arXiv:1810.04805), and what
tells a generator's guesses (arXiv:2003.10555).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn.linear import normal
from jaxlm.nn.mlp import GELU, Dense, bent
from jaxlm.nn.norms import LayerNorm


@shaped
def transformed(x_BTD: jax.Array, transform: Dense | None, norm: LayerNorm | None) -> jax.Array:
    """What the head reads: hidden states through a layer, GELU and a norm. Raises `Mistake` where these are None."""
    if transform is None or norm is None:
        raise Mistake("this model has no head for masked tokens (config.model.masked=False)")
    return norm(bent(GELU, transform(x_BTD)), x_BTD.dtype)


class Replaced(nnx.Module):
    """Logits [B, T] in float32: a token is a generator's guess, and not the text's own."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.layer = Dense(width, rngs=rngs)
        self.replaced_D = normal(rngs, width, std=0.02)

    @shaped
    def __call__(self, x_BTD):
        return bent(GELU, self.layer(x_BTD)).astype(jnp.float32) @ self.replaced_D[...]
