"""Mixture of experts: each token goes to the MLPs that a router picks for it, and none is dropped (arXiv:2211.15841).

Tokens are sorted by expert, so that each expert's lie together; one ragged product a layer of the MLP does the rest.
Where devices have rows of their own, each sorts its own tokens: sorted together, all tokens would go to every device.
One CPU has faster ways: all experts for many tokens, copies of the chosen for a few.

Where devices have experts of their own as well (`config.mesh.expert`), tokens travel (arXiv:2006.16668), but without a
limit to what a device takes, so the results are one device's:

    sorted by expert    0 0 0 1 2 2 3 3    tokens of a device, of which two devices have two experts each
    sent, received      0 0 0 1 | 0 1 1    what this device sends itself, and what the other one has for it
    sorted again        0 0 0 0 1 1 1      and the same way back

A TPU sends what there is, into a buffer for what there may be: every token of every device. See `_exchanged`.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.nn.linear import dense, flat, normal
from jaxlm.nn.mlp import bent


class Routing(NamedTuple):
    """What a router adds to the loss, from sums over the tokens of each row: [B, ...], perhaps [B, L, ...]."""

    share_BE: jax.Array  # of the tokens, how many went to each expert
    prob_BE: jax.Array
    square_B: jax.Array  # squared log-normalisers of the router's logits
    tokens_B: jax.Array

    @classmethod
    def empty(cls, rows: int, layers: int, experts: int) -> "Routing":
        """Zeros [B, L, E] and [B, L]."""
        wide, one = jnp.zeros((rows, layers, experts)), jnp.zeros((rows, layers))
        return cls(wide, wide, one, one)

    @property
    def balance(self) -> jax.Array:
        """1 where all experts get equal shares, up to the number of experts (arXiv:2101.03961, eq. 4); perhaps [L]."""
        tokens = self._tokens[..., None]
        return self.share_BE.shape[-1] * ((self.share_BE.sum(0) / tokens) * (self.prob_BE.sum(0) / tokens)).sum(-1)

    @property
    def z(self) -> jax.Array:
        """The mean of the squared log-normalisers (arXiv:2202.08906, eq. 5); perhaps [L]."""
        return self.square_B.sum(0) / self._tokens

    @property
    def _tokens(self) -> jax.Array:
        return jnp.maximum(self.tokens_B.sum(0), 1.0)


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
        """The experts' weighted sum [B, T, D], and the router's terms of the loss by the tokens that are `real`."""
        B, T, D = x_BTD.shape
        x = x_BTD.reshape(*flat((B, T)), D)
        score = dense(x.astype(jnp.float32), self.router_DE)
        prob = jax.nn.softmax(score, axis=-1)
        weight, expert = jax.lax.top_k(prob, self.chosen)  # [tokens, chosen]
        if self.renormalised:
            weight = weight / weight.sum(axis=-1, keepdims=True)
        E = self.gate_EDF.shape[0]
        matrices = (w[...].astype(x.dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD))
        alone = axes.platform() == "cpu" and axes.alone()
        mixed = _in_parts(B, T, self.gate_EDF.shape) if not alone else _picked if expert.size < E else _all
        y = mixed(x, weight.astype(x.dtype), expert, *matrices).reshape(B, T, D)
        real = jnp.ones((B, T, 1)) if real_BT is None else real_BT[..., None].astype(jnp.float32)
        expert, prob, norm = (a.reshape(B, T, -1) for a in (expert, prob, jax.nn.logsumexp(score, axis=-1)))
        count = jax.vmap(lambda expert, real: jnp.zeros(E).at[expert].add(jnp.broadcast_to(real, expert.shape)))
        squares = (jnp.square(norm) * real).sum((1, 2))
        sums = Routing(count(expert, real) / self.chosen, (prob * real).sum(1), squares, real.sum((1, 2)))
        return axes.constrain(y, "BTD"), sums


def _in_parts(B: int, T: int, shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """`_mixed`, on each device for the tokens of B x T that it has, by its part of F: what the parts make of a token is
    summed once. Experts [E, D, F] that are split as tokens are stay where they are; other splits of E are left open.
    """
    place = axes.here()
    if place is None:
        return _mixed
    rows, _, _, parts = axes.spec("BTEF", (B, T, shape[0], shape[2]), *place)
    spread, home = axes.splitting("T", "BT", (B, T)), axes.splitting("E", "EDF", shape)
    names = {*axes.names(rows), *spread, *axes.names(parts)}
    if not names:
        return _mixed
    home = home if {*home} <= names else ()
    shared = parts in spread  # devices have parts of all that they have between them, and tokens of their own before
    ours = PartitionSpec(rows, spread) if spread else PartitionSpec(rows)

    def mixed(x, weight, expert, gate_EDF, up_EDF, down_EFD):
        if shared:
            x, weight, expert = (jax.lax.all_gather(a, parts, axis=1, tiled=True) for a in (x, weight, expert))
        elif parts is not None:  # said here, its gradient is summed here: once a token, not once an expert
            x, weight = (jax.lax.pcast(a, parts, to="varying") for a in (x, weight))
        tokens, weight, expert = (a.reshape(-1, a.shape[-1]) for a in (x, weight, expert))
        some = (tokens, weight, expert, gate_EDF, up_EDF, down_EFD)
        y = (_exchanged(*some, home) if home else _mixed(*some)).reshape(x.shape)
        if shared:
            return jax.lax.psum_scatter(y, parts, scatter_dimension=1, tiled=True)
        return y if parts is None else jax.lax.psum(y, parts)

    into, out = PartitionSpec(home or None, None, parts), PartitionSpec(home or None, parts)
    return jax.shard_map(mixed, in_specs=(ours, ours, ours, into, into, out), out_specs=ours, axis_names=names)


def _mixed(
    x: jax.Array, weight: jax.Array, expert: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array
) -> jax.Array:  # fmt: skip
    """What its experts [tokens, chosen] make of each token of x [tokens, D], times their weights, summed."""
    chosen, flat = expert.shape[1], expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=len(gate_EDF)).astype(jnp.int32)
    out = _by_expert(x[order // chosen], counts, gate_EDF, up_EDF, down_EFD, full=True)
    return jnp.zeros_like(x).at[order // chosen].add(out * weight.reshape(-1)[order][:, None])


def _by_expert(
    rows: jax.Array, counts: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, *, full: bool
) -> jax.Array:  # fmt: skip
    """What experts make of rows [.., D]: of the first `counts[0]` the first one, and so on. If these are not all, what
    comes out behind them may be anything, but reaches no gradient.
    """

    @jax.checkpoint  # else what is kept for it is as large as y
    def clear(y, count):
        return jnp.where(jnp.arange(len(y))[:, None] < count, y, jnp.zeros((), y.dtype))

    gate, up = (jax.lax.ragged_dot(rows, w_EDF, counts) for w_EDF in (gate_EDF, up_EDF))
    if not full:  # a kernel may leave there what was in memory, and nothing times what is not a number is no number
        gate, up = (clear(y, counts.sum()) for y in (gate, up))
    return jax.lax.ragged_dot(bent(jax.nn.silu, gate, up), down_EFD, counts)


def _exchanged(
    x: jax.Array, weight: jax.Array, expert: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array,
    over: tuple[str, ...],
) -> jax.Array:  # fmt: skip
    """`_mixed` where each device `over` these mesh axes has tokens and experts of its own."""
    (tokens, chosen), own, devices = expert.shape, len(gate_EDF), jax.lax.axis_size(over)
    flat, most = expert.reshape(-1), tokens * min(chosen, own)  # rows that one device may send to one other
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=devices * own).astype(jnp.int32).reshape(devices, own)
    theirs = jax.lax.all_to_all(counts, over, 0, 0, tiled=True)  # [devices, own]: rows that each has for my experts
    sent, received, size = counts.sum(axis=1), theirs.sum(axis=1), devices * most
    rows = _exchange(x[order // chosen], sent, received, size, most, over)
    whose = jnp.repeat(jnp.tile(jnp.arange(own), devices), theirs.reshape(-1), total_repeat_length=size)
    again = jnp.argsort(jnp.where(jnp.arange(size) < received.sum(), whose, own), stable=True)
    out = _by_expert(rows[again], theirs.sum(axis=0), gate_EDF, up_EDF, down_EFD, full=False)
    out = _exchange(out[jnp.argsort(again)], received, sent, len(flat), most, over)
    return jnp.zeros_like(x).at[order // chosen].add(out * weight.reshape(-1)[order][:, None])


def _exchange(
    rows: jax.Array, sent: jax.Array, received: jax.Array, size: int, most: int, over: tuple[str, ...]
) -> jax.Array:  # fmt: skip
    """Rows [size, D] from all devices, one device's behind another's, then zeros: `sent` of mine, which lie in that
    order, to each; `received` from each. One sends one other `most` rows at most.
    """
    begin, land = jnp.cumsum(sent) - sent, jnp.cumsum(received) - received
    empty = jnp.pad(rows[:0], ((0, size), (0, 0)))  # zeros that are each device's own, as rows are
    if axes.platform() != "cpu":
        there = jax.lax.all_to_all(land, over, 0, 0, tiled=True)  # where mine will lie on each device
        return jax.lax.ragged_all_to_all(rows, empty, begin, sent, there, received, axis_name=over)
    each = jnp.arange(most)[None]  # a CPU can send as much to all only: room for the most
    parts = rows[jnp.minimum(begin[:, None] + each, len(rows) - 1)]
    parts = jax.lax.all_to_all(parts, over, 0, 0, tiled=True)
    lands = jnp.where(each < received[:, None], land[:, None] + each, size)
    return empty.at[lands].set(parts, mode="drop")


def _all(x, weight, expert, gate_EDF, up_EDF, down_EFD):
    """The same with every expert for every token, as one product a matrix. On a CPU a ragged product does as much for
    each of the chosen, and holds a masked copy of the tokens for each expert.
    """
    E, D, F = gate_EDF.shape
    beside = lambda w_EDF: w_EDF.transpose(1, 0, 2).reshape(D, E * F)  # noqa: E731
    share = jnp.zeros((len(x), E), x.dtype).at[jnp.arange(len(x))[:, None], expert].add(weight)
    hidden = bent(jax.nn.silu, dense(x, beside(gate_EDF)), dense(x, beside(up_EDF)))
    hidden = hidden.reshape(-1, E, F) * share[:, :, None]
    return dense(hidden.reshape(-1, E * F), down_EFD.reshape(E * F, D))


def _picked(x, weight, expert, gate_EDF, up_EDF, down_EFD):
    """The same for a few tokens, fewer than there are experts: only what they chose is read."""
    gate, up, down = (w[expert] for w in (gate_EDF, up_EDF, down_EFD))
    hidden = bent(jax.nn.silu, *(jnp.einsum("td,tcdf->tcf", x, w) for w in (gate, up)))
    return jnp.einsum("tcf,tcfd,tc->td", hidden, down, weight)
