"""Who may look at whom: a description, from which each attention backend builds what it needs.

visible(Mask(segments_BT=[[1 1 2 2]]), 0..3, 0..3)[0]     1 . . .
                                                          1 1 . .
                                                          . . 1 .
                                                          . . 1 1
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may look at whom. Query t stands at slot `offset + t` of the keys; all conditions must hold.

    causal: a query sees keys at its own slot and before; window: at most that many keys, its own included;
    segments_BT: only keys of its own segment (queries and keys are the same tokens then);
    offset_B: the slot of each row's first query, for queries that continue a cache (0 otherwise).
    """

    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    segments_BT: jax.Array | None = None
    offset_B: jax.Array | None = None


def visible(mask: Mask, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether query slot t (of the given range [T]) sees key slot s (of [S]): booleans [B or 1, T, S]."""
    at = queries[None, :, None] if mask.offset_B is None else mask.offset_B[:, None, None] + queries[None, :, None]
    ahead = at - keys[None, None, :]
    see = jnp.ones_like(ahead, bool)
    if mask.causal:
        see &= ahead >= 0
    if mask.window is not None:
        see &= ahead < mask.window
        see &= True if mask.causal else ahead > -mask.window
    if mask.segments_BT is not None:
        see = see & (mask.segments_BT[:, queries, None] == mask.segments_BT[:, None, keys])
    return see
