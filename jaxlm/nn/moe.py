"""Mixture of experts: each token goes to the MLPs that a router picks for it, and none is dropped (arXiv:2211.15841).

Tokens are sorted by expert, so that each expert's lie together; one ragged product a layer of the MLP does the rest.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.nn.linear import dense, normal


class Routing(NamedTuple):
    """What a router adds to the loss, as means over tokens."""

    balance: jax.Array  # 1 where all experts get equal shares, up to the number of experts (arXiv:2101.03961, eq. 4)
    z: jax.Array  # squared log-normaliser of the router's logits (arXiv:2202.08906, eq. 5)


class MoE(nnx.Module):
    """Gated MLPs with SiLU, `chosen` of them a token, weighted by the router's probabilities.

    `renormalised`: the weights of the chosen sum to one (Mixtral, arXiv:2401.04088); else they are as they were.
    """

    def __init__(
        self, width: int, mlp_width: int, experts: int, chosen: int, *, renormalised: bool, std: float, out_std: float,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.router_DE = normal(rngs, width, experts, std=std)
        self.gate_EDF = normal(rngs, experts, width, mlp_width, std=std)
        self.up_EDF = normal(rngs, experts, width, mlp_width, std=std)
        self.down_EFD = normal(rngs, experts, mlp_width, width, std=out_std)
        self.chosen, self.renormalised = chosen, renormalised

    @shaped
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum [B, T, D], and the router's terms of the loss over the tokens that are `real`."""
        B, T, D = x_BTD.shape
        x = x_BTD.reshape(B * T, D)
        score = dense(x.astype(jnp.float32), self.router_DE)
        prob = jax.nn.softmax(score, axis=-1)
        weight, expert = jax.lax.top_k(prob, self.chosen)  # [tokens, chosen]
        if self.renormalised:
            weight = weight / weight.sum(axis=-1, keepdims=True)
        E = prob.shape[-1]
        flat = expert.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        counts = jnp.bincount(flat, length=E).astype(jnp.int32)
        rows = x[order // self.chosen]
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD))
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, counts)) * jax.lax.ragged_dot(rows, up, counts)
        out = jax.lax.ragged_dot(hidden, down, counts) * weight.reshape(-1)[order][:, None].astype(x.dtype)
        y = jnp.zeros_like(x).at[order // self.chosen].add(out).reshape(B, T, D)
        real = jnp.ones(B * T) if real_BT is None else real_BT.reshape(-1).astype(jnp.float32)
        real = (real / jnp.maximum(real.sum(), 1.0))[:, None]
        share = jnp.zeros(E).at[expert].add(jnp.broadcast_to(real, expert.shape) / self.chosen)
        balance = E * (share * (prob * real).sum(axis=0)).sum()
        z = (jnp.square(jax.nn.logsumexp(score, axis=-1)) * real[:, 0]).sum()
        return axes.constrain(y, "BTD"), Routing(balance, z)
