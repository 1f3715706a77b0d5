"""Layers stacked and scanned: L blocks are one block whose parameters have a leading axis L, so compile time does not
grow with depth.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx
import jax

from jaxlm import axes, lookup

Block = TypeVar("Block", bound=nnx.Module)

IN_A_ROW = 12  # layers; beyond, compile time matters more

REMAT: dict[str, Callable | None] = {  # what the backward pass keeps of a layer; it computes the rest again
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stacked(make: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """L blocks as one: every parameter of `make(rngs)` gains a leading axis L, each layer with its own draw."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), layers)
    return nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))


def scan(
    blocks: nnx.Module, carry: Any, step: Callable[[Any, Any, Any], Any], per_layer: Any = None, *, remat: str = "none"
) -> Any:
    """Run `carry = step(block, carry, slice of per_layer)` through the layers; `remat` names a policy of `REMAT`.

    On a CPU up to `IN_A_ROW` layers stand in a row instead: a scan there copies each layer's weights out of the stack,
    and what the backward pass needs into another. So do layers whose parameters come as tuples of L arrays.
    """
    policy = lookup.key("config.model.remat", remat, REMAT)
    graph, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)
    first = jax.tree.leaves(params, is_leaf=_is_tuple)[0]

    def body(carry, xs):
        params, extra = xs
        return step(nnx.merge(graph, params), carry, extra), None

    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    if not _is_tuple(first) and (policy is not None or len(first) > IN_A_ROW or axes.platform() != "cpu"):
        return jax.lax.scan(body, carry, (params, per_layer))[0]
    layers = jax.tree.map(_apart, params, is_leaf=_is_tuple)
    for i in range(len(first)):
        layer = jax.tree.map(lambda x, i=i: x[i], layers, is_leaf=_is_tuple)
        carry, _ = body(carry, (layer, jax.tree.map(lambda x, i=i: x[i], per_layer)))
    return carry


def _is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


def _apart(x: jax.Array | tuple) -> tuple[jax.Array, ...]:
    """The layers of a stack; its gradient is one concatenation, where that of L slices would be L padded sums."""
    return x if isinstance(x, tuple) else tuple(part[0] for part in jax.lax.split(x, [1] * len(x)))
