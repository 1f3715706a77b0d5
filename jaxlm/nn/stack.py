"""Layers stacked and scanned: L blocks are one block whose parameters have a leading axis L, so compile time does not
grow with depth.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx
import jax

from jaxlm import lookup

Block = TypeVar("Block", bound=nnx.Module)

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
    """Run `carry = step(block, carry, slice of per_layer)` through the layers; `remat` names a policy of `REMAT`."""
    policy = lookup.key("config.model.remat", remat, REMAT)
    graph, params = nnx.split(blocks)

    def body(carry, xs):
        params, extra = xs
        return step(nnx.merge(graph, params), carry, extra), None

    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, (params, per_layer))[0]
