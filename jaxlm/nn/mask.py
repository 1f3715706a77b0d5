"""Who may look at whom: a description, from which each attention backend builds what it needs.

visible(Mask(segments_BT=[[1 1 2 2]]), 0..3, 0..3)[0]     1 . . .
                                                          1 1 . .
                                                          . . 1 .
                                                          . . 1 1

with prefix_BT=[[1 1 0 0]] and one segment                1 1 . .
                                                          1 1 . .
                                                          1 1 1 .
                                                          1 1 1 1
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.lookup import Mistake


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may look at whom. Query t stands at slot `offset + t` of the keys; all conditions must hold.

    causal: a query sees keys at its own slot and before; window: at most that many keys, its own included;
    prefix_BT: keys that are 1 there are seen from before them, too, as far as the window reaches;
    segments_BT: only keys of its own segment; keys_BS: the segments of keys that are other tokens than the queries;
    offset_B: the slot of each row's first query, for queries that continue a cache (0 otherwise).
    """

    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    prefix_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None
    keys_BS: jax.Array | None = None
    offset_B: jax.Array | None = None


def across(segments_BT: jax.Array | None, memory_segments_BS: jax.Array | None) -> Mask:
    """How a decoder's tokens look at an encoder's: at all of them, at all that are real (not 0), or at their segment.

    Raises `Mistake` where only the decoder's segments are known.
    """
    if segments_BT is not None and memory_segments_BS is None:
        raise Mistake("a segment of the decoder reads the encoder's segment of its number: give segments_BS too")
    return Mask(causal=False, segments_BT=segments_BT, keys_BS=memory_segments_BS)


def ahead(mask: Mask, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """How many slots query t (of the given range [T]) is ahead of key s (of [S]): [B or 1, T, S]."""
    at = queries[None, :, None] if mask.offset_B is None else mask.offset_B[:, None, None] + queries[None, :, None]
    return at - keys[None, None, :]


def visible(mask: Mask, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether query slot t (of the given range [T]) sees key slot s (of [S]): booleans [B or 1, T, S]."""
    before = ahead(mask, queries, keys)
    see = jnp.ones_like(before, bool)
    if mask.causal:
        see &= before >= 0
    if mask.prefix_BT is not None:
        see = see | (mask.prefix_BT[:, None, keys] > 0)
    if mask.window is not None:
        see = see & (jnp.abs(before) < mask.window)
    if mask.segments_BT is not None:
        others_BS = mask.segments_BT if mask.keys_BS is None else mask.keys_BS
        see = see & (mask.segments_BT[:, queries, None] == others_BS[:, None, keys])
    elif mask.keys_BS is not None:
        see = see & (mask.keys_BS[:, None, keys] > 0)
    return see
