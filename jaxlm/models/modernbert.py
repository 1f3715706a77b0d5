"""ModernBERT: BERT's task for a model built as decoders are now (arXiv:2412.13663).

Norms in front, rotary positions, gated MLPs, no biases, and two local layers after each global one.

Read `Model.hidden` first, `Block` second; the rest is `jaxlm.nn`.
"""

from collections.abc import Mapping, Set
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, hf
from jaxlm.axes import shaped
from jaxlm.lookup import Mistake
from jaxlm.nn import positions, tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.linear import Head, dropout, embed, normal, stream, zeros
from jaxlm.nn.mask import Mask
from jaxlm.nn.masked import Replaced, transformed
from jaxlm.nn.mlp import GELU, Dense, GatedMLP
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.stack import scan, stacked

KIND = "encoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are ModernBERT-base's.

    Drawn as by Megatron (arXiv:1909.08053): by 0.02 and, of what is added to the residual stream, by
    0.02 / sqrt(2 layers).
    """

    vocab: int
    context: int = 8192
    layers: int = 22
    width: int = 768
    heads: int = 12
    mlp_width: int = 1152
    window: int = 128  # of local layers: so many tokens around each
    every: int = 3  # each so-manyth layer is global, the first one too
    rope_base: float = 160_000.0
    rope_base_local: float = 10_000.0
    masked: bool = True  # the head that predicts masked tokens
    generator: int = 0  # layers that guess masked tokens, for ELECTRA; the model's own tell which tokens are guesses
    dropout: float = 0.0
    norm_eps: float = 1e-5
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def is_global(self, layer: int) -> bool:
        """Whether a layer, of the model or of its generator, sees all tokens."""
        return layer % self.every == 0


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's input is normed already."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        out_std = 0.02 * (2 * c.layers) ** -0.5
        self.attn = Attention(
            c.width, c.heads, c.heads, c.head_width, backend=c.attention, std=0.02, out_std=out_std, rngs=rngs
        )
        self.mlp = GatedMLP(c.width, c.mlp_width, GELU, std=0.02, out_std=out_std, rngs=rngs)
        self.norm1 = LayerNorm(c.width, c.norm_eps, bias=False)
        self.norm2 = LayerNorm(c.width, c.norm_eps, bias=False)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, angles, key=None, *, first):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD = x_BTD.astype(self.dtype) if first else self.norm1(x_BTD, self.dtype)
        y_BTD, _ = self.attn(y_BTD, mask, angles)
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        y_BTD = self.mlp(self.norm2(x_BTD, self.dtype))
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD")


class Model(nnx.Module):
    """Token ids to hidden states, to logits of masked tokens."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
        self.norm = LayerNorm(c.width, c.norm_eps, bias=False)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.last = LayerNorm(c.width, c.norm_eps, bias=False)
        self.transform = Dense(c.width, bias=False, rngs=rngs) if c.masked else None
        self.transform_norm = LayerNorm(c.width, c.norm_eps, bias=False) if c.masked else None
        self.bias_V = zeros(c.vocab) if c.masked else None
        self.generator = stacked(lambda rngs: Block(c, rngs=rngs), c.generator, rngs) if c.generator else None
        self.guessed = Replaced(c.width, rngs=rngs) if c.generator else None

    @property
    def head(self) -> Head:
        return Head(self.embed_VD[...], None if self.bias_V is None else self.bias_V[...])

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, positions_BT=None, types_BT=None, key=None, generator=False):
        """Final hidden states [B, T, D] and None (no cache), the model's own or its generator's; padding has segment 0.
        A `key` means dropout.
        """
        c = self.config
        blocks, layers = (self.generator, c.generator) if generator else (self.blocks, c.layers)
        if blocks is None:
            raise Mistake("this model has no generator (config.model.generator=0)")
        if tokens_BT.shape[1] > c.context:
            raise Mistake(f"modernbert: {tokens_BT.shape[1]} tokens, but config.model.context={c.context}")
        if types_BT is not None:
            raise Mistake("modernbert has no token types")
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT)
        wide, near = (positions.angles(positions_BT, c.head_width, x) for x in (c.rope_base, c.rope_base_local))
        keys = [None] * 2 if key is None else [jax.random.fold_in(key, layers), jax.random.split(key, layers)]
        x_BTD = self.norm(embed(self.embed_VD, tokens_BT, c.dtype), stream(c.dtype))
        x_BTD = axes.constrain(dropout(x_BTD, c.dropout, keys[0]), "BTD")

        def step(block, x_BTD, rows, key, kind):
            (mask, wide, near), (first, is_global) = rows, kind
            mask = dataclasses.replace(mask, window=None if is_global else c.window // 2 + 1)
            return block(x_BTD, mask, wide if is_global else near, key, first=first)

        kinds = [(layer == 0, c.is_global(layer)) for layer in range(layers)]
        rows = (Mask(causal=False, segments_BT=segments_BT), wide, near)
        x_BTD = scan(blocks, x_BTD, step, keys[1], rows=rows, remat=c.remat, kinds=kinds)
        return self.last(x_BTD, jnp.dtype(c.dtype)), None

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] of each token as if it were masked, in float32, and None; `where` as in `hidden`."""
        return self.head(self.for_head(self.hidden(tokens_BT, **where)[0])), None

    @shaped
    def for_head(self, x_BTD):
        """What the head for masked tokens reads: hidden states through a layer and a norm of their own."""
        return transformed(x_BTD, self.transform, self.transform_norm)

    @shaped
    def pool(self, x_BTD):
        """Raises `Mistake`: it was not trained to make one state of a row."""
        raise Mistake("modernbert has no pooled state")

    @shaped
    def follows(self, pooled_BD):
        """Raises `Mistake`: nor to tell whether one sentence follows another."""
        raise Mistake("modernbert has no head for the next sentence")


SIZES = {"modernbert-base": {}, "modernbert-large": dict(layers=28, width=1024, heads=16, mlp_width=2624)}


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, hidden_activation="gelu", classifier_activation="gelu", attention_bias=False, mlp_bias=False)
    hf.require(config, norm_bias=False, classifier_bias=False, decoder_bias=True)
    wide, near = (tables.read_rope(config, kind)["rope_base"] for kind in reversed(hf.KINDS))
    if "global_rope_theta" in config:
        wide = config["global_rope_theta"]
        near = config.get("local_rope_theta") or wide
    return dict(
        **hf.read_sizes(config), norm_eps=config["norm_eps"], masked="decoder.bias" in names,
        window=config["local_attention"], every=hf.read_every(config, config.get("global_attn_every_n_layers", 3), 0),
        rope_base=wide, rope_base_local=near,
    )  # fmt: skip


def _write(c: Config) -> dict[str, Any]:
    ropes = {
        kind: dict(rope_theta=x, rope_type="default") for kind, x in zip(hf.KINDS, (c.rope_base_local, c.rope_base))
    }
    kinds = [hf.KINDS[c.is_global(layer)] for layer in range(c.layers)]
    return dict(
        **hf.write_sizes(c), norm_eps=c.norm_eps, local_attention=c.window, global_attn_every_n_layers=c.every,
        layer_types=kinds, rope_parameters=ropes, hidden_activation="gelu",
    )  # fmt: skip


_LAYER = "model.layers.{i}."
_QKV = tuple(f"blocks.attn.{name}" for name in ("wq_DNH", "wk_DKH", "wv_DKH"))
HF = {
    "modernbert": hf.Format(
        architecture=lambda c: "ModernBertForMaskedLM" if c.masked else "ModernBertModel",
        read=_read, write=_write, prefix="model.", absent=("model.layers.0.attn_norm.weight",),
        copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        tensors={
            "model.embeddings.tok_embeddings.weight": ("embed_VD", "V D -> V D"),
            _LAYER + "attn.Wqkv.weight": (_QKV, "(three N H) D -> three D N H"),
            _LAYER + "attn.Wo.weight": ("blocks.attn.wo_NHD", "D (N H) -> N H D"),
            _LAYER + "mlp.Wi.weight": (("blocks.mlp.gate_DF", "blocks.mlp.up_DF"), "(two F) D -> two D F"),
            _LAYER + "mlp.Wo.weight": ("blocks.mlp.down_FD", "D F -> F D"),
            **tables.norms({
                "model.embeddings.norm": "norm", _LAYER + "attn_norm": "blocks.norm1",
                _LAYER + "mlp_norm": "blocks.norm2", "model.final_norm": "last",
            }),
            **tables.masked("head.dense", "head.norm", "decoder.bias"),
        },
    )
}  # fmt: skip
