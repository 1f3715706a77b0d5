"""T5: an encoder and a decoder that read distances in buckets, for any task that maps text to text (arXiv:1910.10683).

T5 1.1, Flan-T5 and mT5 (arXiv:2002.05202, 2010.11934) gate the MLP with GELU and have a head of their own.
Read `Model` first, `Stack` and `Block` second; the rest is `jaxlm.nn`, where `Pair` says how both work together.
"""

from collections.abc import Mapping, Set
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, hf, lookup
from jaxlm.axes import shaped
from jaxlm.nn import tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.linear import dense, dropout, normal
from jaxlm.nn.mlp import GELU_TANH, GatedMLP
from jaxlm.nn.norms import RMSNorm
from jaxlm.nn.pair import Pair, through
from jaxlm.nn.positions import RelativeBias
from jaxlm.nn.stack import stacked

KIND = "encoder-decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are T5 1.1 small's. Drawn as Mesh-TensorFlow does, the paper's code."""

    vocab: int
    context: int = 512  # the longest row it is meant for; distances set no hard limit
    layers: int = 8  # of the encoder
    decoder_layers: int | None = None  # as many as the encoder's unless given
    width: int = 512
    heads: int = 6
    head_width: int = 64
    mlp_width: int = 1024
    mlp: str = "gelu"  # relu: one branch; gelu: gated
    buckets: int = 32
    furthest: int = 128  # tokens; all that is further away shares a bucket
    tied: bool = False  # whether the head is the embedding
    scaled: bool = False  # whether the head reads hidden states times width ** -0.5
    multilingual: bool = False  # written as mT5, which differs in its tokenizer alone
    start: int = 0  # what the decoder's row begins with: the padding
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    def __post_init__(self):
        lookup.key("config.model.mlp", self.mlp, dict.fromkeys(("relu", "gelu")))
        object.__setattr__(self, "decoder_layers", self.decoder_layers or self.layers)


class ReluMLP(nnx.Module):
    """Up, ReLU, down, without biases."""

    def __init__(self, width: int, mlp_width: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.in_DF, self.down_FD = normal(rngs, width, mlp_width, std=std), normal(rngs, mlp_width, width, std=out_std)
        self.mlp_width = mlp_width

    @shaped
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = axes.constrain(x_BTD, "BTD", F=self.mlp_width)
        h_BTF = axes.constrain(jax.nn.relu(dense(x_BTD, self.in_DF)), "BTF")
        return axes.summed(dense(h_BTF, self.down_FD), "BTD", F=self.mlp_width)


class Block(nnx.Module):
    """x + attention(norm(x)), in the decoder x + attention over the encoder's states, then x + mlp(norm(x))."""

    def __init__(self, c: Config, *, decoder: bool, rngs: nnx.Rngs):
        D, F, inner = c.width, c.mlp_width, c.heads * c.head_width
        attention = functools.partial(  # scores are not divided by sqrt(H): the queries' initialisation does it
            Attention, D, c.heads, c.heads, c.head_width, scale=1.0, backend=c.attention, std=D**-0.5,
            q_std=(D * c.head_width) ** -0.5, out_std=inner**-0.5, rngs=rngs,
        )  # fmt: skip
        self.norm1, self.attn = RMSNorm(D, c.norm_eps), attention()
        self.cross_norm, self.cross = (RMSNorm(D, c.norm_eps), attention()) if decoder else (None, None)
        self.norm2 = RMSNorm(D, c.norm_eps)
        std = dict(std=D**-0.5, out_std=F**-0.5)
        self.mlp = ReluMLP(D, F, **std, rngs=rngs) if c.mlp == "relu" else GatedMLP(D, F, GELU_TANH, **std, rngs=rngs)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, bias, cross=None, cache=None, layer=None, key=None):
        """`cross` is what `Attention.over` takes: keys, values and a mask."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y_BTD, cache = self.attn(self.norm1(x_BTD, self.dtype), mask, None, cache, layer, bias)
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        if self.cross is not None and self.cross_norm is not None:
            y_BTD = self.cross.over(self.cross_norm(x_BTD, self.dtype), *(cross or ()))
            x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD")
        y_BTD = self.mlp(self.norm2(x_BTD, self.dtype))
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[2]), "BTD"), cache


class Stack(nnx.Module):
    """The encoder or the decoder: what all its blocks add to scores by distance, the blocks, and a norm."""

    def __init__(self, c: Config, layers: int, *, decoder: bool, rngs: nnx.Rngs):
        self.config, self.layers = c, layers
        self.bias = RelativeBias(c.buckets, c.heads, c.furthest, causal=decoder, rngs=rngs)
        self.blocks = stacked(lambda rngs: Block(c, decoder=decoder, rngs=rngs), layers, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps)

    @shaped
    def __call__(self, x_BTD, positions_BT, mask, memory=None, cache=None, key=None):
        """Positions are not read: distances are those of slots."""
        c = self.config
        first, last = (None, None) if key is None else jax.random.split(key)
        x_BTD = dropout(x_BTD, c.dropout, first)
        x_BTD, cache = through(self.blocks, self.layers, x_BTD, mask, memory, cache, key, self.bias, remat=c.remat)
        return dropout(self.norm(x_BTD, jnp.dtype(c.dtype)), c.dropout, last), cache


def Model(c: Config, *, rngs: nnx.Rngs) -> Pair:
    """Token ids to what the decoder writes about them."""
    embed_VD = normal(rngs, c.vocab, c.width, std=1.0)
    encoder = Stack(c, c.layers, decoder=False, rngs=rngs)
    decoder = Stack(c, c.decoder_layers or c.layers, decoder=True, rngs=rngs)
    untied_VD = None if c.tied else normal(rngs, c.vocab, c.width, std=c.width**-0.5)
    return Pair(c, embed_VD, encoder, decoder, untied_VD=untied_VD, scale=c.width**-0.5 if c.scaled else 1.0)


_V11 = dict(scaled=False, tied=False, mlp="gelu")
_V10 = dict(scaled=True, tied=True, mlp="relu")
SIZES = {
    "t5-small": dict(_V10, layers=6, heads=8, mlp_width=2048),
    "t5-base": dict(_V10, layers=12, width=768, heads=12, mlp_width=3072),
    "t5-large": dict(_V10, layers=24, width=1024, heads=16, mlp_width=4096),
    "t5-3b": dict(_V10, layers=24, width=1024, heads=32, head_width=128, mlp_width=16384),
    "t5-11b": dict(_V10, layers=24, width=1024, heads=128, head_width=128, mlp_width=65536),
    "t5-1.1-small": {},
    "t5-1.1-base": dict(_V11, layers=12, width=768, heads=12, mlp_width=2048),
    "t5-1.1-large": dict(_V11, layers=24, width=1024, heads=16, mlp_width=2816),
    "t5-1.1-xl": dict(_V11, layers=24, width=2048, heads=32, mlp_width=5120),
    "t5-1.1-xxl": dict(_V11, layers=24, width=4096, heads=64, mlp_width=10240),
}


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, feed_forward_proj=("relu", "gated-gelu"), is_encoder_decoder=True)
    scaled = config.get("tie_word_embeddings") is not False  # as transformers tells T5 1.0 from 1.1
    return dict(
        context=config.get("n_positions", 512), layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"], width=config["d_model"],
        heads=config["num_heads"], head_width=config["d_kv"], mlp_width=config["d_ff"],
        mlp="relu" if config["feed_forward_proj"] == "relu" else "gelu",
        buckets=config["relative_attention_num_buckets"], furthest=config["relative_attention_max_distance"],
        tied="lm_head.weight" not in names, norm_eps=config["layer_norm_epsilon"],
        multilingual=config["model_type"] == "mt5",
        scaled=config["model_type"] == "t5" and config.get("scale_decoder_outputs", scaled),
        start=config.get("decoder_start_token_id") or config.get("pad_token_id") or 0,
    )  # fmt: skip


def _write(c: Config, kind: str) -> dict[str, Any]:
    if c.multilingual != (kind == "mt5"):
        raise lookup.Mistake("config.model.multilingual tells T5 from mT5")
    more = dict(scale_decoder_outputs=c.scaled, tie_word_embeddings=c.scaled) if kind == "t5" else {}
    return dict(
        n_positions=c.context, num_layers=c.layers, num_decoder_layers=c.decoder_layers or c.layers, d_model=c.width,
        num_heads=c.heads, d_kv=c.head_width, d_ff=c.mlp_width, is_encoder_decoder=True,
        feed_forward_proj="relu" if c.mlp == "relu" else "gated-gelu", relative_attention_num_buckets=c.buckets,
        relative_attention_max_distance=c.furthest, layer_norm_epsilon=c.norm_eps, decoder_start_token_id=c.start,
        **more,
    )  # fmt: skip


_QKVO = "q k v o"


def _stack(side: str, mlp: int) -> tables.Table:
    layer, first = f"{side}.block.{{i}}.layer", f"{side}.block.0.layer.0.SelfAttention"
    return {
        f"{first}.relative_attention_bias.weight": (f"{side}.bias.table_CN", "C N -> C N"),
        f"{layer}.0.layer_norm.weight": (f"{side}.blocks.norm1.scale_D", "D -> D"),
        **tables.attention(f"{layer}.0.SelfAttention", f"{side}.blocks.attn", _QKVO),
        f"{layer}.{mlp}.layer_norm.weight": (f"{side}.blocks.norm2.scale_D", "D -> D"),
        f"{layer}.{mlp}.DenseReluDense.wi.weight": (f"{side}.blocks.mlp.in_DF", "F D -> D F"),
        **tables.gated(f"{layer}.{mlp}.DenseReluDense", f"{side}.blocks.mlp", "wi_0 wi_1 wo"),
        f"{side}.final_layer_norm.weight": (f"{side}.norm.scale_D", "D -> D"),
    }


_TENSORS = {
    "shared.weight": ("embed_VD", "V D -> V D"),
    **_stack("encoder", 1),
    **_stack("decoder", 2),
    "decoder.block.{i}.layer.1.layer_norm.weight": ("decoder.blocks.cross_norm.scale_D", "D -> D"),
    **tables.attention("decoder.block.{i}.layer.1.EncDecAttention", "decoder.blocks.cross", _QKVO),
    "lm_head.weight": ("untied_VD", "V D -> V D"),
}
HF = {
    kind: hf.Format(
        architecture=architecture, read=_read, write=functools.partial(_write, kind=kind),
        tensors=_TENSORS,
        copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )
    for kind, architecture in dict(t5="T5ForConditionalGeneration", mt5="MT5ForConditionalGeneration").items()
}  # fmt: skip
