"""Layers stacked and scanned: L blocks are one block whose parameters have a leading axis L, so compile time does not
grow with depth.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeVar

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm import axes, lookup
from jaxlm.nn import pipeline
from jaxlm.nn.cache import Cache

Block = TypeVar("Block", bound=nnx.Module)

IN_A_ROW = 12  # layers; beyond, compile time matters more

GIVEN = "given"  # what a layer is given, by name

# What the backward pass keeps of a layer; it computes the rest again. `offload` is `full` with what a layer is given in
# the hosts' memory; on a CPU, which is its own host, it is `full`. It was compiled for TPUs, and not yet run on one.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[GIVEN], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip


def stacked(make: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """L blocks as one: every parameter of `make(rngs)` gains a leading axis L, each layer with its own draw."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), layers)
    return nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))


def scan(
    blocks: nnx.Module, carry: Any, step: Callable[..., Any], per_layer: Any = None, *, rows: Any = None,
    remat: str = "none", kinds: Sequence[Any] | None = None,
) -> Any:  # fmt: skip
    """Run `carry = step(block, carry, rows, slice of per_layer)` through the layers; `remat` names a policy of `REMAT`.

    `rows` are what every layer reads of the same rows, as segments; they and the carry are arrays [B, ...], perhaps
    with a cache. Without one, layers that lie on several stages are a pipeline (`nn/pipeline.py`), through which parts
    of the rows go: so `step` reads of them what it is given, and no array from around it.

    Where layers are of several kinds, `kinds` holds one a layer, and `step` gets it as its last argument, untraced: a
    scan then goes from period to period (local, local, global), and what fits none stands in a row before and behind.

    On a CPU up to `IN_A_ROW` layers stand in a row instead: a scan there copies each layer's weights out of the stack,
    and what the backward pass needs into another. So do layers whose parameters come as tuples of L arrays.
    """
    policy = lookup.key("config.model.remat", remat, REMAT)
    graph, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)

    def layer(carry: Any, rows: Any, xs: Any, kind: tuple) -> Any:
        params, extra = xs
        return step(nnx.merge(graph, params), carry, rows, extra, *kind)

    layers = len(jax.tree.leaves(params, is_leaf=_is_tuple)[0])
    each = [()] * layers if kinds is None else [(kind,) for kind in kinds]
    cached = any(isinstance(x, Cache) for x in jax.tree.leaves(carry, is_leaf=lambda x: isinstance(x, Cache)))
    policy = None if cached else policy  # nothing is differentiated, and a number of a layer is to stay a number
    if not cached and pipeline.split(layers, len(jax.tree.leaves(carry)[0])):
        if remat == "offload":
            raise lookup.Mistake(
                "config.model.remat=offload: layers on several stages keep what they are given; choose full"
            )
        chunk = functools.partial(_through, policy=policy, looped=True)
        return pipeline.run(chunk, layer, carry, rows, params, per_layer, each, kept=policy is None)
    if policy is not None and axes.platform() == "tpu":
        # what stands before the layers begins its backward pass behind theirs: the gradient of a large embedding,
        # whole and summed, has no room beside the last layer's
        carry, params = jax.lax.optimization_barrier((carry, params))
    return _through(lambda carry, xs, kind: layer(carry, rows, xs, kind), carry, (params, per_layer), each, policy)


def _through(
    layer: Callable[..., Any], carry: Any, xs: Any, each: Sequence[tuple], policy: Callable | None, looped: bool = False
) -> Any:
    """Run `carry = layer(carry, slice of xs, kind)` with a kind of `each`; `looped`: in a loop of the caller's."""

    def named(carry, xs, kind):  # single numbers and vectors are not worth sending
        return layer(jax.tree.map(lambda x: checkpoint_name(x, GIVEN) if x.ndim > 1 else x, carry), xs, kind)

    def in_a_row(carry, xs, kinds, looped):
        params, per_layer = xs
        body = layer
        if policy is not None:  # outside a loop the compiler would share what both passes compute, and so keep it
            body = jax.checkpoint(named, policy=policy, prevent_cse=not looped, static_argnums=2)
        params = jax.tree.map(_apart, params, is_leaf=_is_tuple)
        for i, kind in enumerate(kinds):
            one = jax.tree.map(lambda x, i=i: x[i], params, is_leaf=_is_tuple)
            carry = body(carry, (one, jax.tree.map(lambda x, i=i: x[i], per_layer)), kind)
        return carry

    layers, first = len(each), jax.tree.leaves(xs[0], is_leaf=_is_tuple)[0]
    if _is_tuple(first) or (policy is None and layers <= IN_A_ROW and axes.platform() == "cpu"):
        return in_a_row(carry, xs, each, looped)
    before, period, times = _rhythm(each)
    until = before + period * times
    part = lambda start, stop: jax.tree.map(lambda x: x[start:stop], xs)  # noqa: E731
    fold = lambda x: x.reshape(times, period, *x.shape[1:])  # noqa: E731
    carry = in_a_row(carry, part(0, before), each[:before], looped)
    turn = lambda carry, xs: (in_a_row(carry, xs, each[before : before + period], looped or times > 1), None)  # noqa: E731
    carry, _ = jax.lax.scan(turn, carry, jax.tree.map(fold, part(before, until)))
    return in_a_row(carry, part(until, layers), each[until:], looped)


def _rhythm(kinds: Sequence[Any]) -> tuple[int, int, int]:
    """How layers repeat: so many before, then a period, so many times; what is left comes behind. The fewest to trace.

    a b b b b -> (1, 1, 4)      a a g a a g a -> (0, 3, 2)
    """
    best = (len(kinds), 0, len(kinds), 1)
    for before in range(len(kinds)):
        for period in range(1, len(kinds) - before + 1):
            group = kinds[before : before + period]
            times = 1
            while kinds[before + times * period : before + (times + 1) * period] == group:
                times += 1
            traced = len(kinds) - (times - 1) * period
            if traced < best[0]:
                best = (traced, before, period, times)
    return best[1:]


def _is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


def _apart(x: Any) -> Any:
    """The layers of a stack; its gradient is one concatenation, where that of L slices would be L padded sums."""
    if isinstance(x, tuple) or not len(x):
        return x
    return tuple(part[0] for part in jax.lax.split(x, [1] * len(x)))
