"""Recurrent language models: the neural baselines from before attention, Elman networks, GRUs and LSTMs.

The stack is that of Zaremba et al. 2014 (arXiv:1409.2329): a layer reads the states of the one below, dropout acts
between layers and never from token to token, and the head has a bias.

Read `Model.hidden` first, then `nn.recurrent`, where the cells' equations are.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Head, dropout, embed, normal, zeros
from jaxlm.nn.recurrent import CELLS, Recurrent
from jaxlm.nn.stack import scan, stacked

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are Zaremba's medium LSTM's."""

    vocab: int
    context: int = 1024  # the longest row it is meant for; the state sets no limit
    cell: str = "lstm"  # rnn, gru or lstm
    layers: int = 2
    width: int = 650  # of embedding and states
    tied: bool = False  # whether the head is the embedding (arXiv:1608.05859)
    dropout: float = 0.0
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters and states are float32


class Block(nnx.Module):
    """A layer of cells, which reads the layer below through dropout."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.recurrent = Recurrent(c.cell, c.width, std=c.width**-0.5, rngs=rngs)
        self.dropout = c.dropout

    @shaped
    def __call__(self, x_BTD, segments_BT, cache=None, layer=None, key=None):
        x_BTD, cache = self.recurrent(dropout(x_BTD, self.dropout, key), segments_BT, cache, layer)
        return axes.constrain(x_BTD, "BTD"), cache


class Model(nnx.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.25)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.untied_VD = None if c.tied else normal(rngs, c.vocab, c.width, std=c.width**-0.5)
        self.bias_V = zeros(c.vocab)

    @property
    def head(self) -> Head:
        return Head((self.embed_VD if self.untied_VD is None else self.untied_VD)[...], self.bias_V[...])

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, prefix_BT=None, positions_BT=None, cache=None, key=None):
        """Final hidden states [B, T, D] and the cache, if one is given, with T more tokens; a `key` means dropout.

        `positions_BT` is what other decoders take, and changes nothing: a token's place is its turn. Raises `Mistake`
        for a prefix, which it cannot read both ways.
        """
        if prefix_BT is not None:
            raise Mistake("rnn: it reads one way, so it has no prefix; choose a decoder with attention")
        c = self.config
        keys = [None] * 2 if key is None else [jax.random.fold_in(key, c.layers), jax.random.split(key, c.layers)]

        def step(block, carry, segments_BT, extra):
            return block(carry[0], segments_BT, carry[1], *extra)

        x_BTD = embed(self.embed_VD, tokens_BT, c.dtype).astype(jnp.dtype(c.dtype))
        per_layer = (np.arange(c.layers), keys[1])
        x_BTD, cache = scan(self.blocks, (x_BTD, cache), step, per_layer, rows=segments_BT, remat=c.remat)
        return dropout(x_BTD, c.dropout, keys[0]), cache and cache.grow(tokens_BT.shape[1])

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] in float32, and the cache; `where` as in `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return self.head(x_BTD), cache

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for the states after `slots` tokens in each of `batch` rows: h as keys, an LSTM's c as values."""
        c = self.config
        return Cache.empty(c.layers, batch, 1, slots, c.width, jnp.dtype("float32"), values=CELLS[c.cell].memory)


SIZES = {  # arXiv:1409.2329, section 4.1; with 10,000 words, 20 M and 66 M parameters, and dropout of 0.5 and 0.65
    "lstm-medium": {},
    "lstm-large": dict(width=1500),
}
