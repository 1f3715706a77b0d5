"""GPT-2: pre-norm decoder with learned positions, biases and a GELU MLP; the head is the embedding (Radford et al.
2019).

Read `Model.hidden` first, `Block` second; the rest is `jaxlm.nn`.
"""

from collections.abc import Mapping, Set
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes, hf
from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn import positions, tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Head, dropout, embed, normal
from jaxlm.nn.mask import Mask
from jaxlm.nn.mlp import GELU_TANH, MLP
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.stack import scan, stacked

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are the 124M model's.

    The paper does not say how positions are drawn: here with 0.02, as in GPT-1; OpenAI's code for GPT-2 has 0.01.
    """

    vocab: int
    context: int = 1024  # positions that are learned: no longer row can be read
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int | None = None  # 4 x width unless given
    window: int | None = None  # keys that a query of every second layer sees, its own included, as in GPT-3
    dropout: float = 0.0
    norm_eps: float = 1e-5
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        out_std = 0.02 * (2 * c.layers) ** -0.5  # section 2.3: residual layers scaled by their number
        self.norm1, self.norm2 = LayerNorm(c.width, c.norm_eps), LayerNorm(c.width, c.norm_eps)
        self.attn = Attention(
            c.width, c.heads, c.heads, c.head_width, bias=True, backend=c.attention, std=0.02, out_std=out_std,
            rngs=rngs,
        )  # fmt: skip
        self.mlp = MLP(c.width, c.mlp_width or 4 * c.width, GELU_TANH, std=0.02, out_std=out_std, rngs=rngs)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, cache=None, layer=None, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.norm1(x_BTD, self.dtype), mask, None, cache, layer)
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        y_BTD = self.mlp(self.norm2(x_BTD, self.dtype))
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD"), cache


class Model(nnx.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
        self.positions_TD = normal(rngs, c.context, c.width, std=0.02)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.norm = LayerNorm(c.width, c.norm_eps)

    @property
    def head(self) -> Head:
        return Head(self.embed_VD[...])

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, prefix_BT=None, positions_BT=None, cache=None, key=None):
        """Final hidden states [B, T, D] and the cache, if one is given, with T more tokens; a `key` means dropout."""
        c, T = self.config, tokens_BT.shape[1] if cache is None else cache.slots
        if c.context < T:
            raise Mistake(f"gpt2: {T} positions, but only config.model.context={c.context} were learned")
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT, cache)
        x_BTD = embed(self.embed_VD, tokens_BT, c.dtype) + embed(self.positions_TD, positions_BT, c.dtype)
        keys = [None] * 2 if key is None else [jax.random.fold_in(key, c.layers), jax.random.split(key, c.layers)]
        x_BTD = axes.constrain(dropout(x_BTD, c.dropout, keys[0]), "BTD")

        def step(block, carry, mask, extra, window):
            return block(carry[0], dataclasses.replace(mask, window=window), carry[1], *extra)

        windows = [c.window if layer % 2 else None for layer in range(c.layers)]
        per_layer, mask = (np.arange(c.layers), keys[1]), Mask(prefix_BT=prefix_BT, segments_BT=segments_BT)
        x_BTD, cache = scan(self.blocks, (x_BTD, cache), step, per_layer, rows=mask, remat=c.remat, kinds=windows)
        return self.norm(x_BTD, jnp.dtype(c.dtype)), cache and cache.grow(tokens_BT.shape[1])

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] in float32, and the cache."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return self.head(x_BTD), cache

    def empty_cache(self, batch: int, slots: int) -> Cache:
        c = self.config
        return Cache.empty(c.layers, batch, c.heads, slots, c.head_width, jnp.dtype(c.dtype))


SIZES = {
    "gpt2": {},
    "gpt2-medium": dict(layers=24, width=1024, heads=16),
    "gpt2-large": dict(layers=36, width=1280, heads=20),
    "gpt2-xl": dict(layers=48, width=1600, heads=25),
    # GPT-3 (arXiv:2005.14165, table 2.1), whose 1.3B and 13B have heads that do not make up the width there
    "gpt3-125m": dict(context=2048),
    "gpt3-350m": dict(context=2048, layers=24, width=1024, heads=16),
    "gpt3-760m": dict(context=2048, layers=24, width=1536, heads=16),
    "gpt3-1.3b": dict(context=2048, layers=24, width=2048, heads=16),
    "gpt3-2.7b": dict(context=2048, layers=32, width=2560, heads=32),
    "gpt3-6.7b": dict(context=2048, layers=32, width=4096, heads=32),
    "gpt3-13b": dict(context=2048, layers=40, width=5120, heads=40),
    "gpt3-175b": dict(context=2048, layers=96, width=12288, heads=96),
}


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, activation_function="gelu_new", scale_attn_weights=True, tie_word_embeddings=True)
    hf.require(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return dict(
        context=config["n_positions"], layers=config["n_layer"], width=config["n_embd"], heads=config["n_head"],
        mlp_width=config.get("n_inner"), norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )  # fmt: skip


def _write(c: Config) -> dict[str, Any]:
    return dict(
        n_positions=c.context, n_layer=c.layers, n_embd=c.width, n_head=c.heads, n_inner=c.mlp_width,
        layer_norm_epsilon=c.norm_eps, activation_function="gelu_new",
    )  # fmt: skip


_LAYER = "transformer.h.{i}."
HF = {
    "gpt2": hf.Format(
        architecture="GPT2LMHeadModel", read=_read, write=_write, prefix="transformer.",
        copies={"lm_head.weight": "transformer.wte.weight"},
        ignored=(r".*\.attn\.(masked_)?bias",),  # the causal mask, in older files
        tensors={
            "transformer.wte.weight": ("embed_VD", "V D -> V D"),
            "transformer.wpe.weight": ("positions_TD", "T D -> T D"),
            _LAYER + "attn.c_attn.weight": (
                tuple(f"blocks.attn.{w}" for w in ("wq_DNH", "wk_DKH", "wv_DKH")), "D (three N H) -> three D N H"
            ),
            _LAYER + "attn.c_attn.bias": (
                tuple(f"blocks.attn.bias_{b}" for b in ("q_NH", "k_KH", "v_KH")), "(three N H) -> three N H"
            ),
            _LAYER + "attn.c_proj.weight": ("blocks.attn.wo_NHD", "(N H) D -> N H D"),
            _LAYER + "attn.c_proj.bias": ("blocks.attn.bias_D", "D -> D"),
            _LAYER + "mlp.c_fc.weight": ("blocks.mlp.up_DF", "D F -> D F"),
            _LAYER + "mlp.c_fc.bias": ("blocks.mlp.bias_F", "F -> F"),
            _LAYER + "mlp.c_proj.weight": ("blocks.mlp.down_FD", "F D -> F D"),
            _LAYER + "mlp.c_proj.bias": ("blocks.mlp.bias_D", "D -> D"),
            **tables.norms({_LAYER + f"ln_{n}": f"blocks.norm{n}" for n in (1, 2)} | {"transformer.ln_f": "norm"}),
        },
    )
}  # fmt: skip
