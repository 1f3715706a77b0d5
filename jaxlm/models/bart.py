"""BART: an encoder and a decoder that learn to repair damaged text (arXiv:1910.13461); many a summariser is one.

Read `Model` first, `Stack` and `Block` second; the rest is `jaxlm.nn`, where `Pair` says how both work together.
"""

from collections.abc import Mapping, Set
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, hf
from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn import tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.linear import dropout, embed, normal, stream, zeros
from jaxlm.nn.mlp import GELU, MLP
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.pair import Pair, through
from jaxlm.nn.stack import stacked

KIND = "encoder-decoder"
SKIPPED = 2  # rows of the position tables that no token uses
EPS = 1e-5  # of every norm


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are BART-large's."""

    vocab: int
    context: int = 1024  # positions that are learned: no longer row can be read
    layers: int = 12  # of the encoder
    decoder_layers: int | None = None  # as many as the encoder's unless given
    width: int = 1024
    heads: int = 16
    mlp_width: int = 4096
    scaled: bool = False  # whether embeddings are multiplied by width ** 0.5
    bias: bool = True  # of the head
    start: int = 2  # what the decoder's row begins with: the end of a text
    dropout: float = 0.0
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    def __post_init__(self):
        object.__setattr__(self, "decoder_layers", self.decoder_layers or self.layers)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Block(nnx.Module):
    """norm(x + attention(x)), in the decoder norm(x + attention over the encoder's states), then norm(x + mlp(x))."""

    def __init__(self, c: Config, *, decoder: bool, rngs: nnx.Rngs):
        attention = functools.partial(
            Attention, c.width, c.heads, c.heads, c.head_width, bias=True, backend=c.attention, std=0.02, out_std=0.02,
            rngs=rngs,
        )  # fmt: skip
        self.attn, self.norm1 = attention(), LayerNorm(c.width, EPS)
        self.cross, self.cross_norm = (attention(), LayerNorm(c.width, EPS)) if decoder else (None, None)
        self.mlp = MLP(c.width, c.mlp_width, GELU, std=0.02, out_std=0.02, rngs=rngs)
        self.norm2 = LayerNorm(c.width, EPS)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, cross=None, cache=None, layer=None, key=None):
        """`cross` is what `Attention.over` takes: keys, values and a mask."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y_BTD, cache = self.attn(x_BTD.astype(self.dtype), mask, None, cache, layer)
        x_BTD = self.norm1(x_BTD + dropout(y_BTD, self.dropout, keys[0]), stream(self.dtype))
        if self.cross is not None and self.cross_norm is not None:
            y_BTD = self.cross.over(x_BTD.astype(self.dtype), *(cross or ()))
            x_BTD = self.cross_norm(x_BTD + dropout(y_BTD, self.dropout, keys[1]), stream(self.dtype))
        y_BTD = self.mlp(x_BTD.astype(self.dtype))
        x_BTD = self.norm2(x_BTD + dropout(y_BTD, self.dropout, keys[2]), stream(self.dtype))
        return axes.constrain(x_BTD, "BTD"), cache


class Stack(nnx.Module):
    """The encoder or the decoder: learned positions, a norm, and blocks."""

    def __init__(self, c: Config, layers: int, *, decoder: bool, rngs: nnx.Rngs):
        self.config, self.layers = c, layers
        self.positions_TD = normal(rngs, c.context + SKIPPED, c.width, std=0.02)
        self.norm = LayerNorm(c.width, EPS)
        self.blocks = stacked(lambda rngs: Block(c, decoder=decoder, rngs=rngs), layers, rngs)

    @shaped
    def __call__(self, x_BTD, positions_BT, mask, memory=None, cache=None, key=None):
        c = self.config
        longest = x_BTD.shape[1] if cache is None else cache.slots
        if c.context < longest:
            raise Mistake(f"bart: {longest} positions, but only config.model.context={c.context} were learned")
        x_BTD = x_BTD * (c.width**0.5 if c.scaled else 1.0) + embed(self.positions_TD, positions_BT + SKIPPED, c.dtype)
        first = None if key is None else jax.random.fold_in(key, self.layers)
        x_BTD = axes.constrain(dropout(self.norm(x_BTD, stream(c.dtype)), c.dropout, first), "BTD")
        x_BTD, cache = through(self.blocks, self.layers, x_BTD, mask, memory, cache, key, remat=c.remat)
        return x_BTD.astype(c.dtype), cache


def Model(c: Config, *, rngs: nnx.Rngs) -> Pair:
    """Token ids to what the decoder writes about them."""
    embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
    encoder = Stack(c, c.layers, decoder=False, rngs=rngs)
    decoder = Stack(c, c.decoder_layers or c.layers, decoder=True, rngs=rngs)
    return Pair(c, embed_VD, encoder, decoder, bias_V=zeros(c.vocab) if c.bias else None)


SIZES = {"bart-base": dict(layers=6, width=768, heads=12, mlp_width=3072), "bart-large": {}}


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, activation_function="gelu", is_encoder_decoder=True, tie_word_embeddings=True)
    for part in ("attention_heads", "ffn_dim"):
        hf.require(config, **{f"decoder_{part}": config[f"encoder_{part}"]})
    return dict(
        context=config["max_position_embeddings"], layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"], width=config["d_model"], heads=config["encoder_attention_heads"],
        mlp_width=config["encoder_ffn_dim"], scaled=config.get("scale_embedding", False),
        bias="final_logits_bias" in names, start=config.get("decoder_start_token_id", 2),
    )  # fmt: skip


def _write(c: Config) -> dict[str, Any]:
    sides = {
        f"{side}_{key}": value for side, layers in dict(encoder=c.layers, decoder=c.decoder_layers or c.layers).items()
        for key, value in dict(layers=layers, attention_heads=c.heads, ffn_dim=c.mlp_width).items()
    }  # fmt: skip
    return dict(
        max_position_embeddings=c.context, d_model=c.width, scale_embedding=c.scaled, is_encoder_decoder=True,
        activation_function="gelu", tie_word_embeddings=True, decoder_start_token_id=c.start, **sides,
    )  # fmt: skip


def _stack(side: str) -> tables.Table:
    theirs, layer, ours = f"model.{side}", f"model.{side}.layers.{{i}}", f"{side}.blocks"
    parts = "q_proj k_proj v_proj out_proj"
    return {
        f"{theirs}.embed_positions.weight": (f"{side}.positions_TD", "T D -> T D"),
        **tables.attention(f"{layer}.self_attn", f"{ours}.attn", parts),
        **tables.attention(f"{layer}.encoder_attn", f"{ours}.cross", parts),
        **tables.mlp(f"{layer}.fc1", f"{layer}.fc2", f"{ours}.mlp"),
        **tables.norms({
            f"{theirs}.layernorm_embedding": f"{side}.norm", f"{layer}.self_attn_layer_norm": f"{ours}.norm1",
            f"{layer}.encoder_attn_layer_norm": f"{ours}.cross_norm", f"{layer}.final_layer_norm": f"{ours}.norm2",
        }),
    }  # fmt: skip


_SHARED = "model.shared.weight"
HF = {
    "bart": hf.Format(
        architecture="BartForConditionalGeneration", read=_read, write=_write, prefix="model.",
        tensors={
            _SHARED: ("embed_VD", "V D -> V D"), **_stack("encoder"), **_stack("decoder"),
            "final_logits_bias": ("bias_V", "1 V -> V"),
        },
        copies=dict.fromkeys(
            ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"), _SHARED
        ),
    )
}  # fmt: skip
