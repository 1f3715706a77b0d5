"""Recurrent cells: a state goes from token to token, and begins anew with each segment.

    y_BTD, cache = Recurrent("lstm", width, std=0.05, rngs=rngs)(x_BTD, segments_BT, cache, layer)

What x brings to the gates of all tokens is one large product in front of the loop; in the loop is the product with the
state alone. The backward pass is written out, so that the gradient of that product's weight is one large product too,
behind the loop: JAX would add to it with every token, in the weight's dtype (at 512 tokens in bfloat16 ten times the
error). States are float32, whatever products are computed in.

    G gates of a cell   D = F the width of input and state; D is what a product contracts
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, lookup
from jaxlm.axes import shaped
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Tiled, Turned, Weight, dense, normal

State = tuple[jax.Array, jax.Array | None]  # h [B, D], and the memory c [B, D] of a cell that has one


def _rnn(wx, uh, h, c):
    """h' = tanh(W x + U h + b) (Elman 1990, with tanh)."""
    return jnp.tanh(wx[:, 0] + uh[:, 0]), c


def _gru(wx, uh, h, c):
    """Reset and update gates (arXiv:1406.1078v1, section 2.3): h' = z h + (1 - z) tanh(W x + r (U h)).

    The reset gate acts behind U, as in cuDNN; the paper's third version has U (r h), which would be a second product in
    the loop.
    """
    r, z = (jax.nn.sigmoid(wx[:, i] + uh[:, i]) for i in (0, 1))
    return z * h + (1 - z) * jnp.tanh(wx[:, 2] + r * uh[:, 2]), c


def _lstm(wx, uh, h, c):
    """Input, forget and output gates around a memory: c' = f c + i g, h' = o tanh(c') (Hochreiter & Schmidhuber 1997,
    with the forget gate of Gers et al. 2000 and no peepholes: arXiv:1409.2329, section 3.1).
    """
    i, f, o = (jax.nn.sigmoid(wx[:, gate] + uh[:, gate]) for gate in (0, 1, 2))
    c = f * c + i * jnp.tanh(wx[:, 3] + uh[:, 3])
    return o * jnp.tanh(c), c


class Cell(NamedTuple):
    """One step, from what the input and the state bring to the gates [B, G, F], and from the state, to the next state.

    `ones` are gates whose bias begins at 1, so that a fresh cell remembers (Jozefowicz et al. 2015, section 2.3).
    """

    gates: int
    memory: bool
    step: Callable[..., State]
    ones: tuple[int, ...] = ()


CELLS = {"rnn": Cell(1, False, _rnn), "gru": Cell(3, False, _gru), "lstm": Cell(4, True, _lstm, ones=(1,))}


class Recurrent(nnx.Module):
    """A layer of cells of one kind, one for each element of the width. Raises `Mistake` for a cell that is none."""

    def __init__(self, cell: str, width: int, *, std: float, rngs: nnx.Rngs):
        kind = lookup.key("config.model.cell", cell, CELLS)
        self.input_DGF = normal(rngs, width, kind.gates, width, std=std)
        self.recur_DGF = normal(rngs, width, kind.gates, width, std=std)
        self.bias_GF = nnx.Param(jnp.zeros((kind.gates, width)).at[kind.ones, :].set(1.0))
        self.cell = cell

    @shaped
    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None = None, cache: Cache | None = None,
        layer: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """The state h after each token, in x's dtype; from the state that the cache holds, else from zeros."""
        B, T, D = x_BTD.shape
        if cache is not None and layer is not None:
            h_BKH, c_BKH = cache.last(layer)
            state = h_BKH[:, 0], None if c_BKH is None else c_BKH[:, 0]
        else:
            zeros_BD = axes.constrain(jnp.zeros((B, D)), "BD")
            state = zeros_BD, zeros_BD if CELLS[self.cell].memory else None
        into, weight = (_whole(w.get_value(), x_BTD.dtype, T) for w in (self.input_DGF, self.recur_DGF))
        x_BTD = axes.constrain(x_BTD, "B__")  # one token after another: T is whole
        product = jax.vmap(lambda x_BD: dense(x_BD, into, self.bias_GF))  # one, over T and B as they are split
        wx_TBGF = axes.constrain(product(x_BTD.swapaxes(0, 1)), "_BG_")
        fresh_TB = None if segments_BT is None else _fresh(segments_BT).T
        h_BTD, c_BTD = jax.tree.map(lambda x: x.swapaxes(0, 1), _states(self.cell, wx_TBGF, weight, state, fresh_TB))
        if cache is not None and layer is not None:
            cache = cache.write(layer, h_BTD[:, None], None if c_BTD is None else c_BTD[:, None])
        return h_BTD.astype(x_BTD.dtype), cache


def _whole(weight: jax.Array | Turned | Tiled, dtype: jnp.dtype, tokens: int) -> Weight:
    """The weight on every device, gathered once: where gates are split, devices would have to talk for every token. For
    one token that is less than the weight, which then stays where it is.
    """
    if isinstance(weight, Turned | Tiled):
        return weight
    return weight.astype(dtype) if tokens == 1 else axes.constrain(weight.astype(dtype), "___")


def _fresh(segments_BT: jax.Array) -> jax.Array:
    """Where another segment begins than the one before: booleans [B, T], False for a row's first token."""
    return jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0


def _kept(state: State, fresh: jax.Array | None) -> State:
    """The state, or zeros where a segment begins; `fresh` lacks the state's last axis."""
    return state if fresh is None else jax.tree.map(lambda x: jnp.where(fresh[..., None], 0.0, x), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(cell: str, wx_TBGF: jax.Array, weight: jax.Array, state: State, fresh_TB: jax.Array | None) -> State:
    """The states [T, B, D] after each token."""
    return _forward(cell, wx_TBGF, weight, state, fresh_TB)[0]


def _forward(cell, wx_TBGF, weight, state, fresh_TB):
    def step(state, xs):
        wx_BGF, fresh_B = xs
        h_BD, c_BD = _kept(state, fresh_B)
        uh_BGF = dense(h_BD.astype(wx_BGF.dtype), weight)
        state = CELLS[cell].step(wx_BGF.astype(jnp.float32), uh_BGF.astype(jnp.float32), h_BD, c_BD)
        return state, (state, uh_BGF)

    states, uh_TBGF = jax.lax.scan(step, state, (wx_TBGF, fresh_TB))[1]
    before = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, states)
    return states, (wx_TBGF, uh_TBGF, weight, _kept(before, fresh_TB), fresh_TB)


def _backward(cell, saved, d_states):
    wx_TBGF, uh_TBGF, weight, before, fresh_TB = saved
    dtype = wx_TBGF.dtype

    def step(d_state, xs):
        wx_BGF, uh_BGF, before, fresh_B, d_out = xs
        pull = jax.vjp(CELLS[cell].step, wx_BGF.astype(jnp.float32), uh_BGF.astype(jnp.float32), *before)[1]
        d_wx, d_uh, d_h, d_c = pull(jax.tree.map(jnp.add, d_state, d_out))
        d_wx, d_uh = d_wx.astype(dtype), d_uh.astype(dtype)
        d_h += jnp.einsum("bgf,dgf->bd", d_uh, weight, preferred_element_type=jnp.float32)
        return _kept((d_h, d_c), fresh_B), (d_wx, d_uh)

    start = jax.tree.map(lambda x: jnp.zeros_like(x[0]), d_states)
    xs = (wx_TBGF, uh_TBGF, before, fresh_TB, d_states)
    d_state, (d_wx_TBGF, d_uh_TBGF) = jax.lax.scan(step, start, xs, reverse=True)
    h_TBD = before[0].astype(dtype)
    d_weight = jnp.einsum("tbd,tbgf->dgf", h_TBD, d_uh_TBGF, preferred_element_type=jnp.float32)
    return d_wx_TBGF, d_weight.astype(weight.dtype), d_state, None


_states.defvjp(_forward, _backward)
