"""Attention where the tokens of a row lie on several devices: `config.model.attention` is `ring` or `alltoall`.

    alltoall    tokens are traded for heads before, and back behind: each device then has whole rows of some heads,
                which any other backend serves (Ulysses, arXiv:2309.14509). Devices cannot be more than heads.
    ring        keys and values go round, to the next device a turn, and each device's queries read those that pass
                (arXiv:2310.01889). What a device holds, forward and backward, is linear in its own tokens.

Where queries see what is before them, the last device of a ring would have all the work. So halves are exchanged first:

    device              0    1    2    3
    eighths of a row    01   23   45   67      as they come
                        07   16   25   34      in the ring: as many pairs of a query and a key on each

Masks are as everywhere: rows of ids (segments, prefixes) are whole on each device, and `visible` is asked about slots.
Blocks of which it says that nobody sees anything are skipped. Read `attend` first.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import axes
from jaxlm.lookup import Mistake
from jaxlm.nn.mask import Mask, ahead, visible

WAYS = ("ring", "alltoall")
HIDDEN = -1e30  # finite, so that a query that has seen nothing yet stays finite
CHUNK = 512  # queries, and keys, of a block at most

Shape = tuple[int, ...]


def split(q_shape: Shape, k_shape: Shape, mask: Mask) -> tuple[str, ...]:
    """The mesh axes that split the tokens of these queries [B, N, T, H] and keys; none for queries that continue a
    cache, or where keys are divided by other numbers.
    """
    over = axes.splitting("T", "BNTH", q_shape)
    return () if mask.offset_B is not None or k_shape[2] % axes.ways(over) else over


def attend(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, way: str, cap: float | None,
    bias: Callable | None, inner: Callable[..., jax.Array],
) -> jax.Array:  # fmt: skip
    """Attention of tokens that are `split`: [B, N, T, H] in v's dtype; `auto` is alltoall where there are heads enough.

    `inner(q, k, v, mask, "auto", cap, bias)` computes it where tokens are whole. A `bias` is a module, whose parameters
    are split by their N. Raises `Mistake` for `alltoall` with too few heads.
    """
    place, heads = axes.here(), axes.splitting("N", "BNTH", q_BNTH.shape)
    over = axes.splitting("T", "BNTH", q_BNTH.shape)
    assert place is not None and over
    devices, own = axes.ways(over), q_BNTH.shape[1] // axes.ways(heads)
    if way == "auto":
        way = "ring" if own % devices else "alltoall"
    if way == "alltoall" and own % devices:
        raise Mistake(
            f"attention backend 'alltoall': {own} heads do not divide over the {devices} devices that have the tokens "
            f"of a row ({' x '.join(over)}); choose 'ring'"
        )
    parts = heads if way == "ring" else heads + over  # what heads are split by while attention is computed
    K = k_BKSH.shape[1]
    k, v = (jnp.repeat(x, math.lcm(K, axes.ways(parts)) // K, axis=1) for x in (k_BKSH, v_BKSH))
    graph, state = (None, None) if bias is None else nnx.split(bias)
    params = {} if state is None else nnx.to_pure_dict(state)
    rows = axes.spec("B", q_BNTH.shape[:1], *place)
    tokens = PartitionSpec(*rows, heads or None, over)
    by_name = lambda path, _: PartitionSpec(*(parts if x == "N" else None for x in axes.of(axes.name_of(path)) or ""))  # noqa: E731
    places = (tokens, tokens, tokens, rows, jax.tree_util.tree_map_with_path(by_name, params))
    if way == "ring":
        local = functools.partial(_ring, over=over, devices=devices, cap=cap, graph=graph)
    else:
        local = functools.partial(_traded, over=over, cap=cap, graph=graph, inner=inner)
    run = jax.shard_map(local, in_specs=places, out_specs=tokens, axis_names=axes.free(), check_vma=False)
    return run(q_BNTH, k, v, mask, params)


def _traded(q, k, v, mask: Mask, params, *, over, cap, graph, inner) -> jax.Array:
    """On each device: its tokens of all its heads for all tokens of some of them, and back."""
    q, k, v = (jax.lax.all_to_all(x, over, split_axis=1, concat_axis=2, tiled=True) for x in (q, k, v))
    out = inner(q, k, v, mask, "auto", cap, None if graph is None else nnx.merge(graph, params))
    return jax.lax.all_to_all(out, over, split_axis=2, concat_axis=1, tiled=True)


class Ring(NamedTuple):
    """How keys go round; T and S are tokens of one device."""

    over: tuple[str, ...]
    devices: int
    turns: int  # after which a window is past
    folded: bool  # whether halves were exchanged
    T: int
    S: int
    cap: float | None
    graph: Any  # of the bias

    def slots(self, device: jax.Array, length: int) -> jax.Array:
        """Where in the row a device's tokens stand, in blocks."""
        part = length // (1 + self.folded)
        firsts = [device * part] + [(2 * self.devices - 1 - device) * part] * self.folded
        slots = jnp.concatenate([first + jnp.arange(part) for first in firsts])
        return slots.reshape(-1, self.chunk(length))

    def chunk(self, length: int) -> int:
        """Tokens of a block: as many as divide what lies together."""
        part = length // (1 + self.folded)
        return max(size for size in range(1, min(part, CHUNK) + 1) if part % size == 0)

    def cut(self, x: jax.Array) -> jax.Array:
        """[.., tokens, H] -> [blocks, .., tokens of a block, H]"""
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, self.chunk(x.shape[-2]), x.shape[-1]), -3, 0)

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    def on(self, tree: Any, by: int = 1) -> Any:
        """What the device has that is `by` places before, in its stead."""
        around = [(d, (d + by) % self.devices) for d in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.over, around), tree) if by % self.devices else tree


def _ring(q, k, v, mask: Mask, params, *, over, devices, cap, graph) -> jax.Array:
    """On each device: its queries over the keys and values of all, which come by."""
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    ordered = mask.causal and mask.window is None and mask.keys_BS is None
    turns = devices
    if mask.window is not None and mask.causal and mask.prefix_BT is None:  # devices just before are seen, no others
        turns = min(devices, 1 - (1 - mask.window) // S)
    how = Ring(over, devices, turns, ordered and T == S and T % 2 == 0, T, S, cap, graph)
    q = (q * H**-0.5).reshape(B, K, N // K, T, H)
    if how.folded:
        q, k, v = (_fold(x, how) for x in (q, k, v))
    seen = (1 + how.chunk(T) / (T * devices)) / 2 if how.folded else 1.0  # of the blocks; `jaxlm plan` reads it
    with jax.named_scope(f"seen_{seen:.4f}"):
        out = jnp.asarray(_around(how, q, k, v, mask, params))
    return (_unfold(out, how) if how.folded else out).reshape(B, N, T, H)


def _homes(how: Ring) -> list[list[tuple[int, int]]]:
    """Where the first and the second half of each device's tokens go."""
    halves = 2 * how.devices
    return [[(d, min(2 * d + i, halves - 1 - 2 * d - i)) for d in range(how.devices)] for i in range(2)]


def _fold(x: jax.Array, how: Ring) -> jax.Array:
    """Exchange halves of [.., tokens, H]: as they come -> as they are in the ring."""
    a, b = (jax.lax.ppermute(half, how.over, to) for half, to in zip(jnp.split(x, 2, axis=-2), _homes(how)))
    even = jax.lax.axis_index(how.over) % 2 == 0  # the half that stands first in the row is here the first
    return jnp.concatenate([jnp.where(even, a, b), jnp.where(even, b, a)], axis=-2)


def _unfold(x: jax.Array, how: Ring) -> jax.Array:
    """The inverse of `_fold`."""
    a, b = jnp.split(x, 2, axis=-2)
    even = jax.lax.axis_index(how.over) % 2 == 0
    halves = zip((jnp.where(even, a, b), jnp.where(even, b, a)), _homes(how))
    return jnp.concatenate([jax.lax.ppermute(x, how.over, [(i, d) for d, i in to]) for x, to in halves], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(how: Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, params: Any) -> jax.Array:
    """[B, K, G, T, H] in v's dtype."""
    return _forward(how, q, k, v, mask, params)[0]


def _score(how: Ring, mask: Mask, queries: jax.Array, keys: jax.Array, q: jax.Array, k: jax.Array, params: Any):
    """Scores [B, K, G, t, s] of the queries in these slots for the keys in those, whether they see them or not."""
    score = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    if how.cap is not None:
        score = how.cap * jnp.tanh(score / how.cap)
    if how.graph is not None:
        bias = nnx.merge(how.graph, params)(ahead(mask, queries, keys))
        score = score + bias.reshape(len(bias), *score.shape[1:])
    return score


def _forward(how: Ring, q, k, v, mask, params):
    """The softmax block by block, with what is known of it so far: its highest score and its sum."""
    # JAX computes what no layer changes once, before the layers, and would keep the masks of all blocks: so, it cannot.
    here, mask, q = jax.lax.optimization_barrier((jax.lax.axis_index(how.over), mask, q))
    sums = jnp.zeros((*q.shape[:-1], 1))

    def block(state, q, queries, k, v, keys):
        see = visible(mask, queries, keys)[:, None, None]

        def add(state):
            high, total, out = state
            score = _score(how, mask, queries, keys, q, k, params) + (1.0 - see) * HIDDEN
            higher = jnp.maximum(high, score.max(-1, keepdims=True))
            power = jnp.exp(score - higher) * see
            new = jnp.einsum("bkgts,bksh->bkgth", power.astype(v.dtype), v, preferred_element_type=jnp.float32)
            shrink = jnp.exp(high - higher)
            return higher, total * shrink + power.sum(-1, keepdims=True), out * shrink + new

        return jax.lax.cond(see.any(), add, lambda state: state, state)

    def turn(carry, number):
        kv, state = carry
        keys = how.slots((here - number) % how.devices, how.S)

        def some(_, xs):
            state, *mine = xs
            over_keys = lambda state, theirs: (block(state, *mine, *theirs), None)  # noqa: E731
            return None, jax.lax.scan(over_keys, state, (*kv, keys))[0]

        return (how.on(kv), jax.lax.scan(some, None, (state, how.cut(q), how.slots(here, how.T)))[1]), None

    state = tuple(how.cut(x) for x in (sums + HIDDEN, sums, jnp.zeros(q.shape)))
    (_, (high, total, out)), _ = jax.lax.scan(turn, ((how.cut(k), how.cut(v)), state), jnp.arange(how.turns))
    total = jnp.where(total == 0, 1.0, total)  # of a query that sees nothing: zeros come out
    out, norm = how.joined(out / total).astype(v.dtype), how.joined(high + jnp.log(total))
    return out, (q, k, v, mask, params, out, norm)


def _backward(how: Ring, kept, d_out):
    """With P = exp(S - norm) and o = P v: dv = P' do, dS = P (do v' - do . o); gradients of keys go round with them."""
    q, k, v, mask, params, out, norm = kept
    here = jax.lax.axis_index(how.over)
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)

    def block(sums, q, d_out, norm, inner, queries, k, v, keys):
        see = visible(mask, queries, keys)[:, None, None]

        def add(sums):
            score, pull = jax.vjp(functools.partial(_score, how, mask, queries, keys), q, k, params)
            power = jnp.where(see, jnp.exp(score - norm), 0.0)
            d_v = jnp.einsum("bkgts,bkgth->bksh", power.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
            d_power = jnp.einsum("bkgth,bksh->bkgts", d_out, v, preferred_element_type=jnp.float32)
            d_q, d_k, d_params = pull(power * (d_power - inner))
            return jax.tree.map(jnp.add, sums, (d_q.astype(jnp.float32), d_k.astype(jnp.float32), d_v, d_params))

        return jax.lax.cond(see.any(), add, lambda sums: sums, sums)

    def turn(carry, number):
        kv, d_kv, d_q, d_params = carry
        keys = how.slots((here - number) % how.devices, how.S)

        def some(carry, xs):
            d_q, *mine = xs

            def over_keys(carry, theirs):
                d_k, d_v, *theirs = theirs
                d_q, d_k, d_v, d_params = block((carry[0], d_k, d_v, carry[1]), *mine, *theirs)
                return (d_q, d_params), (d_k, d_v)

            (d_q, d_params), d_kv = jax.lax.scan(over_keys, (d_q, carry[1]), (*carry[0], *kv, keys))
            return (d_kv, d_params), d_q

        mine = (*(how.cut(x) for x in (q, d_out, norm, inner)), how.slots(here, how.T))
        (d_kv, d_params), d_q = jax.lax.scan(some, (d_kv, d_params), (d_q, *mine))
        return (*how.on((kv, d_kv)), d_q, d_params), None

    kv = how.cut(k), how.cut(v)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape), tree)  # noqa: E731
    start = (kv, zeros(kv), zeros(how.cut(q)), zeros(params))
    (_, d_kv, d_q, d_params), _ = jax.lax.scan(turn, start, jnp.arange(how.turns))
    d_k, d_v = (how.joined(x) for x in how.on(d_kv, -how.turns))
    return how.joined(d_q).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_params


_around.defvjp(_forward, _backward)
