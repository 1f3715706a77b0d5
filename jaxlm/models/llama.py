"""Llama: pre-norm decoder with rotary positions, grouped queries and a gated MLP (arXiv:2302.13971).

Mistral (sliding window, arXiv:2310.06825), Qwen2 (biases, arXiv:2407.10671), Qwen3 (norms of queries and keys,
arXiv:2505.09388) and SmolLM differ in settings alone.

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

from jaxlm import axes, hf, lookup
from jaxlm.axes import shaped
from jaxlm.nn import positions, tables
from jaxlm.nn.attention import Attention
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Head, dropout, embed, normal
from jaxlm.nn.mask import Mask
from jaxlm.nn.mlp import GatedMLP
from jaxlm.nn.norms import HeadNorm, RMSNorm
from jaxlm.nn.stack import scan, stacked

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are the 7B model's.

    The papers do not say how parameters are drawn: here as GPT-2's, by 0.02 and, of what is added to the residual
    stream, by 0.02 / sqrt(2 layers).
    """

    vocab: int
    context: int = 4096  # the longest row it is meant for; rotary positions set no hard limit
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    rope_base: float = 10_000.0
    rope_scaling: Any = None  # what `positions.Scaling` takes: kind, factor, ...
    tied: bool = False  # whether the head is the embedding
    bias: str = "none"  # of attention: none, qkv or all
    qk_norm: bool = False
    window: int | None = None  # keys that a query sees, its own included; all before it unless given
    window_from: int = 0  # the first layer that has the window
    dropout: float = 0.0
    norm_eps: float = 1e-5
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    def __post_init__(self):
        lookup.key("config.model.bias", self.bias, BIAS)
        object.__setattr__(self, "rope_scaling", positions.Scaling.of(self.rope_scaling))

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer."""
        return [self.window if layer >= self.window_from else None for layer in range(self.layers)]


BIAS = {"none": (False, False), "qkv": (True, False), "all": (True, True)}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        std, out_std = 0.02, 0.02 * (2 * c.layers) ** -0.5
        self.norm1, self.norm2 = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.attn = Attention(
            c.width, c.heads, c.kv_heads, c.head_width, bias=BIAS[c.bias][0], out_bias=BIAS[c.bias][1],
            qk_norm=functools.partial(HeadNorm, eps=c.norm_eps) if c.qk_norm else None, backend=c.attention, std=std,
            out_std=out_std, rngs=rngs,
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
    def head(self) -> Head:
        return Head((self.embed_VD if self.untied_VD is None else self.untied_VD)[...])

    @shaped
    def hidden(self, tokens_BT, *, segments_BT=None, prefix_BT=None, positions_BT=None, cache=None, key=None):
        """Final hidden states [B, T, D] and the cache, if one is given, with T more tokens; a `key` means dropout."""
        c = self.config
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT, cache)
        angles = positions.angles(positions_BT, c.head_width, c.rope_base, c.rope_scaling)
        x_BTD = embed(self.embed_VD, tokens_BT, c.dtype)
        keys = None if key is None else jax.random.split(key, c.layers)

        def step(block, carry, rows, extra, window):
            mask, angles = rows
            return block(carry[0], dataclasses.replace(mask, window=window), angles, carry[1], *extra)

        per_layer, rows = (np.arange(c.layers), keys), (Mask(prefix_BT=prefix_BT, segments_BT=segments_BT), angles)
        x_BTD, cache = scan(self.blocks, (x_BTD, cache), step, per_layer, rows=rows, remat=c.remat, kinds=c.windows)
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


_LONG = dict(kind="llama3", original=8192, low_freq=1.0, high_freq=4.0)
_THIRD = dict(context=131072, kv_heads=8, rope_base=5e5, rope_scaling=dict(_LONG, factor=8.0))
_POCKET = dict(_THIRD, tied=True, rope_scaling=dict(_LONG, factor=32.0))
_QWEN2 = dict(context=32768, rope_base=1e6, norm_eps=1e-6, bias="qkv")
_QWEN3 = dict(context=40960, rope_base=1e6, norm_eps=1e-6, qk_norm=True, kv_heads=8)
_SMALL = dict(context=8192, tied=True, head_width=64)
SIZES = {
    "llama2-7b": {},
    "llama2-13b": dict(layers=40, width=5120, heads=40, kv_heads=40, mlp_width=13824),
    "llama2-70b": dict(layers=80, width=8192, heads=64, kv_heads=8, mlp_width=28672),
    "llama3-8b": dict(context=8192, kv_heads=8, mlp_width=14336, rope_base=5e5),
    "llama3.1-8b": dict(_THIRD, mlp_width=14336),
    "llama3.1-70b": dict(_THIRD, layers=80, width=8192, heads=64, mlp_width=28672),
    "llama3.1-405b": dict(_THIRD, layers=126, width=16384, heads=128, mlp_width=53248),
    "llama3.2-1b": dict(_POCKET, layers=16, width=2048, head_width=64, mlp_width=8192),
    "llama3.2-3b": dict(_POCKET, layers=28, width=3072, heads=24, mlp_width=8192),
    "mistral-7b": dict(context=32768, kv_heads=8, mlp_width=14336, window=4096),
    "qwen2.5-0.5b": dict(
        _QWEN2, layers=24, width=896, heads=14, kv_heads=2, head_width=64, mlp_width=4864, tied=True
    ),
    "qwen2.5-1.5b": dict(_QWEN2, layers=28, width=1536, heads=12, kv_heads=2, mlp_width=8960, tied=True),
    "qwen2.5-7b": dict(_QWEN2, layers=28, width=3584, heads=28, kv_heads=4, mlp_width=18944),
    "qwen2.5-72b": dict(_QWEN2, layers=80, width=8192, heads=64, kv_heads=8, mlp_width=29568),
    "qwen3-0.6b": dict(_QWEN3, layers=28, width=1024, heads=16, mlp_width=3072, tied=True),
    "qwen3-8b": dict(_QWEN3, layers=36, mlp_width=12288),
    "qwen3-32b": dict(_QWEN3, layers=64, width=5120, heads=64, mlp_width=25600),
    "smollm2-135m": dict(_SMALL, layers=30, width=576, heads=9, kv_heads=3, mlp_width=1536, rope_base=1e5),
    "smollm2-360m": dict(_SMALL, layers=32, width=960, heads=15, kv_heads=5, mlp_width=2560, rope_base=1e5),
    "smollm2-1.7b": dict(_SMALL, layers=24, width=2048, heads=32, kv_heads=32, mlp_width=8192, rope_base=1.3e5),
}  # fmt: skip


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, hidden_act="silu", mlp_bias=False)
    kind, (window, first) = config["model_type"], _window(config)
    bias = "qkv" if kind == "qwen2" else "all" if config.get("attention_bias") else "none"
    return dict(
        **hf.read_grouped(config), **tables.read_rope(config), tied=config.get("tie_word_embeddings", False), bias=bias,
        qk_norm=kind == "qwen3", window=window, window_from=first,
    )  # fmt: skip


def _window(config: Mapping[str, Any]) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it."""
    kind, window, types = config["model_type"], config.get("sliding_window"), config.get("layer_types")
    if not window or not dict(llama=False, mistral=True).get(kind, config.get("use_sliding_window", False)):
        return None, 0
    if not types:  # as older Qwens are written
        first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
        return (window, first) if first < config["num_hidden_layers"] else (None, 0)
    if "sliding_attention" not in types:
        return None, 0
    first = types.index("sliding_attention")
    if types != ["full_attention"] * first + ["sliding_attention"] * (len(types) - first):
        raise lookup.Mistake("config.json: layer_types change more than once; this family has one change at most")
    return window, first


def _write(c: Config, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = dict(
        **hf.write_grouped(c), **tables.write_rope(c), tie_word_embeddings=c.tied, attention_bias=c.bias == "all",
        hidden_act="silu",
    )  # fmt: skip
    if kind != "llama":
        config["sliding_window"] = c.window
    if kind.startswith("qwen"):
        types = [hf.KINDS[window is None] for window in c.windows]
        config |= dict(use_sliding_window=c.window is not None, max_window_layers=c.window_from, layer_types=types)
    return config


_LAYER = "model.layers.{i}."
_TENSORS = {
    "model.embed_tokens.weight": ("embed_VD", "V D -> V D"),
    _LAYER + "input_layernorm.weight": ("blocks.norm1.scale_D", "D -> D"),
    **tables.attention(_LAYER + "self_attn", "blocks.attn"),
    _LAYER + "post_attention_layernorm.weight": ("blocks.norm2.scale_D", "D -> D"),
    **tables.gated(_LAYER + "mlp", "blocks.mlp"),
    "model.norm.weight": ("norm.scale_D", "D -> D"),
    "lm_head.weight": ("untied_VD", "V D -> V D"),
}  # fmt: skip
HF = {
    kind: hf.Format(
        architecture=architecture, read=_read, write=functools.partial(_write, kind=kind), tensors=_TENSORS,
        prefix="model.", ignored=(r".*rotary_emb\.inv_freq",), copies={"lm_head.weight": "model.embed_tokens.weight"},
    )
    for kind, architecture in dict(
        llama="LlamaForCausalLM", mistral="MistralForCausalLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM",
    ).items()
}  # fmt: skip
