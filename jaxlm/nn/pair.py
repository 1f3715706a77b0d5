"""An encoder and a decoder that reads its states: what all families of that kind do alike.

Read `Pair.__call__` first. A family brings the two stacks of blocks; `through` leads a row through the blocks of one.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.axes import shaped
from jaxlm.nn import pipeline, positions
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Head, embed
from jaxlm.nn.mask import Mask, across
from jaxlm.nn.stack import scan


class Memory(NamedTuple):
    """What a decoder's blocks read besides its own tokens."""

    states_BSD: jax.Array | None  # the encoder's; None where a cache holds the keys and values of them
    mask: Mask  # how the decoder's tokens look at them


class Pair(nnx.Module):
    """Token ids to what the decoder writes about them.

    A stack is called with embeddings [B, T, D], positions [B, T] and their `Mask`, the decoder's also with a `Memory`
    and a cache, both perhaps with a key for dropout; it returns states [B, T, D] and the cache. The head's rows are the
    embedding's unless `untied_VD` holds others; `scale` multiplies what it reads. Of the config, sizes are read.
    """

    def __init__(
        self, config: Any, embed_VD: nnx.Param, encoder: nnx.Module, decoder: nnx.Module, *,
        untied_VD: nnx.Param | None = None, bias_V: nnx.Param | None = None, scale: float = 1.0,
    ):  # fmt: skip
        self.config, self.embed_VD, self.untied_VD, self.bias_V = config, embed_VD, untied_VD, bias_V
        self.encoder: Any = encoder
        self.decoder: Any = decoder
        self.scale = scale

    @property
    def head(self) -> Head:
        table_VD = self.embed_VD if self.untied_VD is None else self.untied_VD
        return Head(table_VD[...], None if self.bias_V is None else self.bias_V[...])

    @shaped
    def __call__(self, tokens_BS, decoder_BT, *, segments_BS=None, segments_BT=None, key=None):
        """Logits [B, T, V] in float32 of what follows each of the decoder's tokens, and None."""
        keys = (None, None) if key is None else jax.random.split(key)
        memory_BSD = self.encode(tokens_BS, segments_BS=segments_BS, key=keys[0])
        where = dict(memory_BSD=memory_BSD, segments_BT=segments_BT, memory_segments_BS=segments_BS)
        return self.head(self.hidden(decoder_BT, **where, key=keys[1])[0]), None

    @shaped
    def encode(self, tokens_BS, *, segments_BS=None, key=None):
        """The encoder's states [B, S, D]; padding has segment 0. A `key` means dropout."""
        where_BS, mask = positions.of(tokens_BS, segments_BS), Mask(causal=False, segments_BT=segments_BS)
        return self.encoder(embed(self.embed_VD, tokens_BS, self.config.dtype), where_BS, mask, key=key)[0]

    @shaped
    def hidden(
        self, tokens_BT, *, memory_BSD=None, segments_BT=None, memory_segments_BS=None, cache=None, key=None
    ):  # fmt: skip
        """The decoder's final hidden states [B, T, D], as the head reads them, and the cache, if one is given, with T
        more tokens.

        `memory_BSD` is what `encode` gave; a cache from `remember` holds it already.
        """
        seen = across(segments_BT, memory_segments_BS if cache is None else cache.real)
        where_BT, mask = positions.of(tokens_BT, segments_BT, cache), Mask(segments_BT=segments_BT)
        x_BTD = embed(self.embed_VD, tokens_BT, self.config.dtype)
        x_BTD, cache = self.decoder(x_BTD, where_BT, mask, Memory(memory_BSD, seen), cache, key)
        return x_BTD * self.scale, cache and cache.grow(tokens_BT.shape[1])

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens of the decoder in each of `batch` rows; `remember` what it reads about."""
        c = self.config
        layers = c.decoder_layers or c.layers
        return Cache.empty(layers, batch, c.heads, slots, c.head_width, jnp.dtype(c.dtype))

    @shaped
    def remember(self, cache: Cache, memory_BSD, real_BS) -> Cache:
        """The cache with every layer's keys and values of the encoder's states; `real_BS` is 0 for padding."""
        return cache.remember(self.decoder.blocks, memory_BSD, real_BS)


def through(
    blocks: Any, layers: int, x_BTD: jax.Array, mask: Mask, memory: Memory | None, cache: Cache | None,
    key: jax.Array | None, *more: Any, remat: str,
) -> tuple[jax.Array, Cache | None]:  # fmt: skip
    """Lead x through the blocks of a stack: each is called with x, the mask, `more`, what its `cross` attention takes
    (None without a memory), the cache, its number and a key. Returns x and the cache. `more` are modules of parameters
    that all layers share; in a pipeline each layer is given a copy, since no array may come from around it, and what
    is made of them for all layers at once elsewhere is made for each.
    """
    keys = None if key is None else jax.random.split(key, layers)
    graph, copies = None, None
    if cache is None and pipeline.split(layers, len(x_BTD)):
        graph, params = nnx.split(more)
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), nnx.to_pure_dict(params))

    held = None if cache is None else cache.cross
    apart = held if held is not None and isinstance(held[0], tuple) else None  # an array a layer, not to be sliced

    def step(block, carry, rows, extra):
        (mask, memory), (layer, key, kv, own) = rows, extra
        cross = None
        if apart is not None:
            kv = tuple(layers[layer] for layers in apart)
        if memory is not None:
            cross = (*(block.cross.keys_values(memory.states_BSD) if kv is None else kv), memory.mask)
        return block(carry[0], mask, *(more if graph is None else nnx.merge(graph, own)), cross, carry[1], layer, key)

    per_layer = (np.arange(layers), keys, held if apart is None else None, copies)
    return scan(blocks, (x_BTD, cache), step, per_layer, rows=(mask, memory), remat=remat)
