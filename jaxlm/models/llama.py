"""Llama: pre-norm decoder with rotary positions, grouped queries and a gated MLP (arXiv:2302.13971).

Read `Model.hidden` first, `Block` second; the rest is `jaxlm.nn`.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.nn import positions
from jaxlm.nn.attention import Attention
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import dropout, embed, logits, normal
from jaxlm.nn.mask import Mask
from jaxlm.nn.mlp import GatedMLP
from jaxlm.nn.norms import RMSNorm
from jaxlm.nn.stack import scan, stacked


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are the 7B model's."""

    vocab: int
    context: int = 4096  # the longest row it is meant for; rotary positions set no hard limit
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    rope_base: float = 10_000.0
    tied: bool = False  # whether the head is the embedding
    window: int | None = None  # sliding window of keys, as in Mistral (arXiv:2310.06825)
    dropout: float = 0.0
    norm_eps: float = 1e-5
    attention: str = "auto"
    remat: str = "none"
    dtype: str = "float32"  # what products are computed in; parameters and the residual stream are float32


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        std, out_std = 0.02, 0.02 * (2 * c.layers) ** -0.5
        self.norm1, self.norm2 = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.attn = Attention(
            c.width, c.heads, c.kv_heads, c.head_width, backend=c.attention, std=std, out_std=out_std, rngs=rngs
        )  # fmt: skip
        self.mlp = GatedMLP(c.width, c.mlp_width, jax.nn.silu, std=std, out_std=out_std, rngs=rngs)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, angles, cache=None, layer=None, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.norm1(x_BTD, self.dtype), mask, angles, cache, layer)
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        y_BTD = self.mlp(self.norm2(x_BTD, self.dtype))
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD"), cache


class Model(nnx.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.untied_VD = None if c.tied else normal(rngs, c.vocab, c.width, std=0.02)

    @property
    def head_VD(self) -> jax.Array:
        return (self.embed_VD if self.untied_VD is None else self.untied_VD)[...]

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, positions_BT=None, cache=None, key=None):
        """Final hidden states [B, T, D] and the cache, if one is given, with T more tokens; a `key` means dropout."""
        c = self.config
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT, cache)
        angles = positions.angles(positions_BT, c.head_width, c.rope_base)
        x_BTD = embed(self.embed_VD, tokens_BT)
        mask = Mask(window=c.window, segments_BT=segments_BT)
        keys = None if key is None else jax.random.split(key, c.layers)

        def step(block, carry, extra):
            return block(carry[0], mask, angles, carry[1], *extra)

        x_BTD, cache = scan(self.blocks, (x_BTD, cache), step, (np.arange(c.layers), keys), remat=c.remat)
        return self.norm(x_BTD, jnp.dtype(c.dtype)), cache and cache.grow(tokens_BT.shape[1])

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] in float32, and the cache; `where` as in `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return logits(x_BTD, self.head_VD), cache

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens in each of `batch` rows."""
        c = self.config
        return Cache.empty(c.layers, batch, c.kv_heads, slots, c.head_width, jnp.dtype(c.dtype))
