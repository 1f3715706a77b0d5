"""How a model's weights are held while it reads few tokens at a time: the time of a token is that of reading them.

    rounded(params, dtype)         a TPU or GPU: the same, but all that products read in their dtype
    laid = lay(params, dtype)      a CPU: blocks["mlp"]["up_DF"]: [L, D, F] -> L matrices [F, D]

On a CPU a scan copies each layer's weight out of the stack before it uses it, which triples the time of a token. And a
product with one row reads a matrix a third faster along what it contracts: a token of GPT-2 124M, a sixth. In the dtype
that products are computed in, bfloat16 is half as much to read, and `nn.native` reads it as fast as memory gives it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes
from jaxlm.models import Tree
from jaxlm.nn import native
from jaxlm.nn.linear import Tiled, Turned


def rounded(params: Tree, dtype: Any) -> Tree:
    """The parameters with weights and tables of rows in `dtype`, as every product rounds them anyway; routers, norms,
    biases and what distances add to scores stay as they are.
    """

    def one(path: tuple, x: jax.Array) -> jax.Array:
        letters = axes.of(axes.name_of(path)) or "_"
        ends = letters[0] + letters[-1]
        return x.astype(dtype) if axes.is_matrix(path) and (ends[0] == "E" or ("D" in ends and ends[1] != "E")) else x

    return jax.tree_util.tree_map_with_path(one, params)


def lay(params: Tree, dtype: Any) -> Tree:
    """The decoder blocks' parameters as tuples of L arrays, their weights turned and in `dtype`, for layers that stand
    in a row.

    On one device the weights are copies and all else views; arrays on several devices are split by layer alone.
    """

    def split(path: tuple, x: jax.Array) -> Any:
        keys = [key.key for key in path]
        if "blocks" not in keys or "encoder" in keys:
            return x
        inner = _contracted(axes.name_of(path))
        if len(x.devices()) > 1:
            return tuple(x)
        (device,) = x.devices()
        if not inner:
            return tuple(jax.device_put(layer, device) for layer in np.asarray(x))
        outer = x.shape[1 + inner :]
        return tuple(turn(layer.reshape(-1, math.prod(outer)).T, dtype, device, outer) for layer in np.asarray(x))

    return jax.tree_util.tree_map_with_path(split, params)


def head(table_VD: jax.Array, dtype: Any) -> Tiled | Turned | None:
    """The table of a model's head in bfloat16, as `lay` changes weights; else None."""
    if jnp.dtype(dtype) != jnp.bfloat16 or len(table_VD.devices()) > 1:
        return None
    (device,) = table_VD.devices()
    return turn(np.asarray(table_VD), dtype, device, table_VD.shape[:1])


def turn(matrix: np.ndarray, dtype: Any, device: Any, outer: tuple[int, ...]) -> Tiled | Turned:
    """A matrix [outer, inner] in `dtype`, on the device; in bfloat16 for its own kernel, where that can be had."""
    if jnp.dtype(dtype) == jnp.bfloat16 and native.ready():
        return Tiled(jax.device_put(native.tile(matrix.T), device), outer)
    return Turned(jax.device_put(np.ascontiguousarray(matrix.astype(dtype, copy=False)), device), outer)


def _contracted(name: str) -> int:
    """How many of its first axes a layer's weight contracts: D, or all before it; 0 for what is no weight.

    wq_DNH -> 1    wo_NHD -> 2    bias_F, scale_D -> 0    down_EFD -> 0: many weights, of which few are read
    router_DE -> 0: it chooses in float32, whatever products are computed in
    """
    letters = axes.of(name) or ""
    if len(letters) < 2 or "D" not in letters[0] + letters[-1] or "E" in letters:
        return 0
    return 1 if letters[0] == "D" else len(letters) - 1
