"""The position-wise networks between attention layers."""

from collections.abc import Callable
import functools

from flax import nnx
import jax

from jaxlm import axes
from jaxlm.nn.linear import dense, normal, stream, zeros

GELU = functools.partial(jax.nn.gelu, approximate=False)
GELU_TANH = functools.partial(jax.nn.gelu, approximate=True)  # as GPT-2's code has it


def bent(activation: Callable, x: jax.Array, gated: jax.Array | None = None) -> jax.Array:
    """activation(x), times `gated` if given; on a CPU in float32 and rounded to x's dtype once, since to round each
    step of it costs more than the step.
    """
    y = activation(x.astype(stream(x.dtype)))
    return (y if gated is None else y * gated.astype(y.dtype)).astype(x.dtype)


class MLP(nnx.Module):
    """Up, activation, down, with biases (arXiv:1706.03762)."""

    def __init__(self, width: int, mlp_width: int, activation: Callable, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.up_DF, self.bias_F = normal(rngs, width, mlp_width, std=std), zeros(mlp_width)
        self.down_FD, self.bias_D = normal(rngs, mlp_width, width, std=out_std), zeros(width)
        self.mlp_width, self.activation = mlp_width, activation

    @axes.shaped
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = axes.constrain(x_BTD, "BTD", F=self.mlp_width)
        h_BTF = axes.constrain(bent(self.activation, dense(x_BTD, self.up_DF, self.bias_F)), "BTF")
        return axes.summed(dense(h_BTF, self.down_FD, self.bias_D), "BTD", F=self.mlp_width)


class GatedMLP(nnx.Module):
    """One branch gates the other: SwiGLU where the activation is SiLU (arXiv:2002.05202)."""

    def __init__(self, width: int, mlp_width: int, activation: Callable, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.gate_DF, self.up_DF = normal(rngs, width, mlp_width, std=std), normal(rngs, width, mlp_width, std=std)
        self.down_FD = normal(rngs, mlp_width, width, std=out_std)
        self.mlp_width, self.activation = mlp_width, activation

    @axes.shaped
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = axes.constrain(x_BTD, "BTD", F=self.mlp_width)
        gate_BTF, up_BTF = dense(x_BTD, self.gate_DF), dense(x_BTD, self.up_DF)
        h_BTF = axes.constrain(bent(self.activation, gate_BTF, up_BTF), "BTF")
        return axes.summed(dense(h_BTF, self.down_FD), "BTD", F=self.mlp_width)


class Dense(nnx.Module):
    """A square layer."""

    def __init__(self, width: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.w_DD, self.bias_D = normal(rngs, width, width, std=0.02), zeros(width) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(x, self.w_DD, self.bias_D)
