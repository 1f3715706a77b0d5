"""Keys and values seen so far, for decoding one token at a time.

Row b holds its tokens in slots 0 .. lengths[b]-1, whatever the other rows do; the next token goes to slot lengths[b]. What lies
beyond is stale and out of sight of a causal mask, so prompts are padded on the right and nothing marks the padding.

    k_LBKSH   one array, for layers that are scanned         after `unstacked`: a tuple of L arrays [B, K, S, H], for layers in a
                                                             row; a layer is then read where it lies, where a scan copies it out
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.axes import shaped

Layers = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' keys and values, heads in front of slots, and how many slots of each row are taken."""

    k_LBKSH: Layers
    v_LBKSH: Layers
    lengths_B: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, kv_heads: int, slots: int, head_width: int, dtype: jnp.dtype) -> "Cache":
        """Room for `slots` tokens in each row, none taken."""
        shape = (layers, batch, kv_heads, slots, head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """How many tokens a row has room for."""
        return jax.tree.leaves(self.k_LBKSH)[0].shape[-2]

    @shaped
    def write(self, layer: jax.Array | int, k_BKTH: jax.Array, v_BKTH: jax.Array) -> "Cache":
        """Put T new tokens of one layer behind what each row holds; `grow` then counts them, once all layers have written."""

        def put(old_BKSH, new_BKTH, at=()):
            new = new_BKTH.astype(old_BKSH.dtype)[(None,) * len(at)]
            for b in range(k_BKTH.shape[0]):  # a slice per row: updated in place, where a scatter would copy
                row = jax.lax.slice_in_dim(new, b, b + 1, axis=len(at))
                old_BKSH = jax.lax.dynamic_update_slice(old_BKSH, row, (*at, b, 0, self.lengths_B[b], 0))
            return old_BKSH

        if isinstance(self.k_LBKSH, tuple):
            return self._each(lambda x, new: (*x[:layer], put(x[layer], new), *x[layer + 1 :]), k_BKTH, v_BKTH)
        return self._each(lambda x, new: put(x, new, (layer,)), k_BKTH, v_BKTH)

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values [B, K, S, H]."""
        return self.k_LBKSH[layer], self.v_LBKSH[layer]

    def grow(self, tokens: int | jax.Array) -> "Cache":
        """Count `tokens` more slots of each row as taken (a number, or one number per row)."""
        return dataclasses.replace(self, lengths_B=self.lengths_B + tokens)

    def unstacked(self) -> "Cache":
        """The same with every layer's keys and values an array of its own."""
        return self._each(lambda x: tuple(x[i] for i in range(x.shape[0])))

    def rows(self, index_B: jax.Array) -> "Cache":
        """The rows of the given numbers, which may repeat."""
        axis = 0 if isinstance(self.k_LBKSH, tuple) else 1
        pick = lambda x: jax.tree.map(lambda x: jnp.take(x, index_B, axis), x)  # noqa: E731
        return dataclasses.replace(self._each(pick), lengths_B=self.lengths_B[index_B])

    def _each(self, change: Callable, k: jax.Array | None = None, v: jax.Array | None = None) -> "Cache":
        more = ((), ()) if k is None else ((k,), (v,))
        return dataclasses.replace(self, k_LBKSH=change(self.k_LBKSH, *more[0]), v_LBKSH=change(self.v_LBKSH, *more[1]))
