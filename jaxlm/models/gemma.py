"""Gemma 2 and 3: local and global layers in turn, a norm on both sides of every part (arXiv:2408.00118, 2503.19786).

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and turns local layers by a base of their own.
Read `Model.hidden` first, `Block` second; the rest is `jaxlm.nn`.
"""

from collections.abc import Mapping, Set
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes, hf
from jaxlm.axes import shaped
from jaxlm.nn import positions, tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Head, dropout, embed, normal, stream
from jaxlm.nn.mask import Mask
from jaxlm.nn.mlp import GELU_TANH, GatedMLP
from jaxlm.nn.norms import HeadNorm, RMSNorm
from jaxlm.nn.stack import scan, stacked

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are Gemma 2 2B's.

    The papers do not say how parameters are drawn: here by 0.02, as in transformers; a norm follows every part.
    """

    vocab: int
    context: int = 8192  # the longest row it is meant for; rotary positions set no hard limit
    layers: int = 26
    width: int = 2304
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 256
    mlp_width: int = 9216
    window: int = 4096  # keys that a query of a local layer sees, its own included
    every: int = 2  # each so-manyth layer is global
    scale: int = 256  # scores are divided by its square root
    cap_scores: float | None = 50.0
    cap_logits: float | None = 30.0
    qk_norm: bool = False
    rope_base: float = 10_000.0
    rope_base_local: float = 10_000.0
    rope_scaling: Any = None  # of global layers: what `positions.Scaling` takes
    dropout: float = 0.0
    norm_eps: float = 1e-6
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    def __post_init__(self):
        object.__setattr__(self, "rope_scaling", positions.Scaling.of(self.rope_scaling))

    @property
    def is_global(self) -> list[bool]:
        """Whether each layer sees all tokens before."""
        return [layer % self.every == self.every - 1 for layer in range(self.layers)]


class Block(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, c.width, c.norm_eps, offset=1.0)
        self.norm1, self.after1, self.norm2, self.after2 = norm(), norm(), norm(), norm()
        self.attn = Attention(
            c.width, c.heads, c.kv_heads, c.head_width, scale=c.scale**-0.5, cap=c.cap_scores,
            qk_norm=functools.partial(HeadNorm, eps=c.norm_eps, offset=1.0) if c.qk_norm else None,
            backend=c.attention, std=0.02, out_std=0.02, rngs=rngs,
        )  # fmt: skip
        self.mlp = GatedMLP(c.width, c.mlp_width, GELU_TANH, std=0.02, out_std=0.02, rngs=rngs)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, angles, cache=None, layer=None, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.norm1(x_BTD, self.dtype), mask, angles, cache, layer)
        y_BTD = self.after1(y_BTD, stream(self.dtype))
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        y_BTD = self.after2(self.mlp(self.norm2(x_BTD, self.dtype)), stream(self.dtype))
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD"), cache


class Model(nnx.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps, offset=1.0)

    @property
    def head(self) -> Head:
        return Head(self.embed_VD[...], cap=self.config.cap_logits)

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, prefix_BT=None, positions_BT=None, cache=None, key=None):
        """Final hidden states [B, T, D] and the cache, if one is given, with T more tokens; a `key` means dropout."""
        c = self.config
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT, cache)
        wide = positions.angles(positions_BT, c.head_width, c.rope_base, c.rope_scaling)
        near = positions.angles(positions_BT, c.head_width, c.rope_base_local)
        x_BTD = embed(self.embed_VD, tokens_BT, c.dtype) * c.width**0.5
        keys = None if key is None else jax.random.split(key, c.layers)

        def step(block, carry, rows, extra, is_global):
            mask, wide, near = rows
            mask = dataclasses.replace(mask, window=None if is_global else c.window)
            return block(carry[0], mask, wide if is_global else near, carry[1], *extra)

        per_layer, mask = (np.arange(c.layers), keys), Mask(prefix_BT=prefix_BT, segments_BT=segments_BT)
        x_BTD, cache = scan(
            self.blocks, (x_BTD, cache), step, per_layer, rows=(mask, wide, near), remat=c.remat, kinds=c.is_global
        )
        return self.norm(x_BTD, jnp.dtype(c.dtype)), cache and cache.grow(tokens_BT.shape[1])

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] in float32, and the cache; `where` as in `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return self.head(x_BTD), cache

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens in each of `batch` rows."""
        c = self.config
        return Cache.empty(c.layers, batch, c.kv_heads, slots, c.head_width, jnp.dtype(c.dtype))


def _third(**sizes: Any) -> dict[str, Any]:
    own = dict(cap_scores=None, cap_logits=None, qk_norm=True, every=6, rope_base=1e6, rope_base_local=1e4)
    return own | sizes


SIZES = {
    "gemma2-2b": {},
    "gemma2-9b": dict(layers=42, width=3584, heads=16, kv_heads=8, mlp_width=14336),
    "gemma2-27b": dict(
        layers=46, width=4608, heads=32, kv_heads=16, head_width=128, mlp_width=36864, scale=144
    ),
    "gemma3-1b": _third(context=32768, width=1152, heads=4, kv_heads=1, mlp_width=6912, window=512),
    "gemma3-4b": _third(
        context=131072, layers=34, width=2560, mlp_width=10240, window=1024,
        rope_scaling=dict(kind="linear", factor=8.0),
    ),
    "gemma3-12b": _third(
        context=131072, layers=48, width=3840, heads=16, kv_heads=8, mlp_width=15360, window=1024,
        rope_scaling=dict(kind="linear", factor=8.0),
    ),
    "gemma3-27b": _third(
        context=131072, layers=62, width=5376, heads=32, kv_heads=16, head_width=128, mlp_width=21504, window=1024,
        scale=168, rope_scaling=dict(kind="linear", factor=8.0),
    ),
}  # fmt: skip


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False, tie_word_embeddings=True)
    hf.require(config, use_bidirectional_attention=(None, False))
    third = config["model_type"] == "gemma3_text"
    every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)) if third else 2
    rope = tables.read_rope(config, "full_attention")
    if third:
        near = tables.read_rope(config, "sliding_attention")["rope_base"]
        near = config.get("rope_local_base_freq", near)
    return dict(
        **hf.read_grouped(config), **rope, rope_base_local=near if third else rope["rope_base"],
        window=config["sliding_window"], every=hf.read_every(config, every, -1),
        scale=int(config["query_pre_attn_scalar"]), cap_scores=config.get("attn_logit_softcapping"),
        cap_logits=config.get("final_logit_softcapping"), qk_norm=third,
    )  # fmt: skip


def _write(c: Config, kind: str) -> dict[str, Any]:
    rope = tables.write_rope(c)["rope_parameters"]
    if kind == "gemma3_text":
        local = dict(rope_theta=c.rope_base_local, rope_type="default")
        rope = dict(full_attention=rope, sliding_attention=local)
    return dict(
        **hf.write_grouped(c), sliding_window=c.window, layer_types=[hf.KINDS[x] for x in c.is_global],
        query_pre_attn_scalar=c.scale, attn_logit_softcapping=c.cap_scores, final_logit_softcapping=c.cap_logits,
        hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, rope_parameters=rope,
    )  # fmt: skip


_LAYER = "model.layers.{i}."
_TENSORS = {
    "model.embed_tokens.weight": ("embed_VD", "V D -> V D"),
    _LAYER + "input_layernorm.weight": ("blocks.norm1.scale_D", "D -> D"),
    **tables.attention(_LAYER + "self_attn", "blocks.attn"),
    _LAYER + "post_attention_layernorm.weight": ("blocks.after1.scale_D", "D -> D"),
    _LAYER + "pre_feedforward_layernorm.weight": ("blocks.norm2.scale_D", "D -> D"),
    **tables.gated(_LAYER + "mlp", "blocks.mlp"),
    _LAYER + "post_feedforward_layernorm.weight": ("blocks.after2.scale_D", "D -> D"),
    "model.norm.weight": ("norm.scale_D", "D -> D"),
}  # fmt: skip
HF = {
    kind: hf.Format(
        architecture=architecture, read=_read, write=functools.partial(_write, kind=kind), tensors=_TENSORS,
        prefix="model.", copies={"lm_head.weight": "model.embed_tokens.weight"},
    )
    for kind, architecture in dict(gemma2="Gemma2ForCausalLM", gemma3_text="Gemma3ForCausalLM").items()
}  # fmt: skip
