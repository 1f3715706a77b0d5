"""What encoders have in front of the head that predicts masked tokens (as in the code of arXiv:1810.04805)."""

import jax

from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn.mlp import GELU, Dense
from jaxlm.nn.norms import LayerNorm


@shaped
def transformed(x_BTD: jax.Array, transform: Dense | None, norm: LayerNorm | None) -> jax.Array:
    """What the head reads: hidden states through a layer, GELU and a norm. Raises `Mistake` where these are None."""
    if transform is None or norm is None:
        raise Mistake("this model has no head for masked tokens (config.model.masked=False)")
    return norm(GELU(transform(x_BTD)), x_BTD.dtype)
