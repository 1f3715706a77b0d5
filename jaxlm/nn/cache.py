"""Keys and values seen so far, for decoding one token at a time.

Row b holds its tokens in slots 0 .. lengths[b]-1, whatever the other rows do; the next token goes to slot lengths[b]. What lies
beyond is stale and out of sight of a causal mask, so prompts are padded on the right and nothing marks the padding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.axes import shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' keys and values, heads in front of slots, and how many slots of each row are taken."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    lengths_B: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, kv_heads: int, slots: int, head_width: int, dtype: jnp.dtype) -> "Cache":
        """Room for `slots` tokens in each row, none taken."""
        shape = (layers, batch, kv_heads, slots, head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    @shaped
    def write(self, layer: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array) -> "Cache":
        """Put T new tokens of one layer behind what each row holds; `grow` then counts them, once all layers have written."""

        def put(old_LBKSH, new_BKTH):
            new = new_BKTH.astype(old_LBKSH.dtype)
            for b in range(new.shape[0]):  # a slice per row: updated in place, where a scatter would copy
                old_LBKSH = jax.lax.dynamic_update_slice(old_LBKSH, new[None, b : b + 1], (layer, b, 0, self.lengths_B[b], 0))
            return old_LBKSH

        return dataclasses.replace(self, k_LBKSH=put(self.k_LBKSH, k_BKTH), v_LBKSH=put(self.v_LBKSH, v_BKTH))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values [B, K, S, H]."""
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.k_LBKSH, self.v_LBKSH))  # type: ignore

    def grow(self, tokens: int | jax.Array) -> "Cache":
        """Count `tokens` more slots of each row as taken (a number, or one number per row)."""
        return dataclasses.replace(self, lengths_B=self.lengths_B + tokens)
