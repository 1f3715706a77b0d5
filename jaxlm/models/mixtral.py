"""Mixtral: a Llama whose MLP is a mixture of experts (arXiv:2401.04088). Qwen3-MoE norms queries and keys as well.

Read `Model.hidden` first, `Block` second, `nn/moe.py` third.
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
from jaxlm.nn.moe import MoE, Routing
from jaxlm.nn.norms import HeadNorm, RMSNorm
from jaxlm.nn.stack import scan, stacked

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are Mixtral 8x7B's. Drawn as Llama's: the paper does not say how."""

    vocab: int
    context: int = 32768  # the longest row it is meant for; rotary positions set no hard limit
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    mlp_width: int = 14336  # of one expert
    experts: int = 8
    chosen: int = 2  # experts a token
    renormalised: bool = True  # whether the weights of the chosen sum to one
    balance: float = 0.01  # weight in the loss of the term that keeps experts evenly used
    router_z: float = 0.0  # and of the one that keeps the router's logits small
    rope_base: float = 1e6
    rope_scaling: Any = None  # what `positions.Scaling` takes
    tied: bool = False  # whether the head is the embedding
    bias: bool = False  # of attention
    qk_norm: bool = False
    window: int | None = None
    dropout: float = 0.0
    norm_eps: float = 1e-5
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters, router and the residual stream are float32

    def __post_init__(self):
        if not 1 <= self.chosen <= self.experts:
            raise lookup.Mistake(f"config.model: chosen={self.chosen} of experts={self.experts}")
        object.__setattr__(self, "rope_scaling", positions.Scaling.of(self.rope_scaling))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        std, out_std = 0.02, 0.02 * (2 * c.layers) ** -0.5
        self.norm1, self.norm2 = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.attn = Attention(
            c.width, c.heads, c.kv_heads, c.head_width, bias=c.bias,
            qk_norm=functools.partial(HeadNorm, eps=c.norm_eps) if c.qk_norm else None, backend=c.attention, std=std,
            out_std=out_std, rngs=rngs,
        )  # fmt: skip
        self.moe = MoE(
            c.width, c.mlp_width, c.experts, c.chosen, renormalised=c.renormalised, std=std, out_std=out_std, rngs=rngs
        )
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, angles, cache=None, layer=None, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.norm1(x_BTD, self.dtype), mask, angles, cache, layer)
        x_BTD = axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[0]), "BTD")
        real_BT = None if mask.segments_BT is None else mask.segments_BT > 0
        y_BTD, routing = self.moe(self.norm2(x_BTD, self.dtype), real_BT)
        return axes.constrain(x_BTD + dropout(y_BTD, self.dropout, keys[1]), "BTD"), cache, routing


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
        x_BTD, cache, _ = self.routed(
            tokens_BT, segments_BT=segments_BT, prefix_BT=prefix_BT, positions_BT=positions_BT, cache=cache, key=key
        )  # fmt: skip
        return x_BTD, cache

    @shaped
    def routed(self, tokens_BT, *, segments_BT=None, prefix_BT=None, positions_BT=None, cache=None, key=None):
        """The same, and what the routers add to the loss: a mean over layers, weighted as the config says."""
        c = self.config
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT, cache)
        angles = positions.angles(positions_BT, c.head_width, c.rope_base, c.rope_scaling)
        mask = Mask(window=c.window, prefix_BT=prefix_BT, segments_BT=segments_BT)
        keys = None if key is None else jax.random.split(key, c.layers)

        def step(block, carry, rows, extra):
            x_BTD, cache, sums = carry
            x_BTD, cache, routing = block(x_BTD, *rows, cache, *extra)
            put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, extra[0], 1)  # noqa: E731
            return x_BTD, cache, jax.tree.map(put, sums, routing)

        start = (embed(self.embed_VD, tokens_BT, c.dtype), cache, Routing.empty(len(tokens_BT), c.layers, c.experts))
        per_layer = (np.arange(c.layers), keys)
        x_BTD, cache, sums = scan(self.blocks, start, step, per_layer, rows=(mask, angles), remat=c.remat)
        added = (c.balance * sums.balance + c.router_z * sums.z).mean()
        return self.norm(x_BTD, jnp.dtype(c.dtype)), cache and cache.grow(tokens_BT.shape[1]), added

    @shaped
    def __call__(self, tokens_BT, **where):
        """Logits [B, T, V] in float32, and the cache; `where` as in `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return self.head(x_BTD), cache

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens in each of `batch` rows."""
        c = self.config
        return Cache.empty(c.layers, batch, c.kv_heads, slots, c.head_width, jnp.dtype(c.dtype))


SIZES = {
    "8x7b": {},
    "8x22b": dict(context=65536, layers=56, width=6144, heads=48, mlp_width=16384),
    "qwen3-30b-a3b": dict(
        context=40960, layers=48, width=2048, heads=32, kv_heads=4, mlp_width=768, experts=128, chosen=8, qk_norm=True,
        norm_eps=1e-6,
    ),
    "qwen3-235b-a22b": dict(
        context=40960, layers=94, width=4096, heads=64, kv_heads=4, mlp_width=1536, experts=128, chosen=8,
        qk_norm=True, norm_eps=1e-6,
    ),
}  # fmt: skip


def _read(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=([], None))
    qwen = config["model_type"] == "qwen3_moe"
    return hf.read_grouped(config) | tables.read_rope(config) | dict(
        mlp_width=config["moe_intermediate_size" if qwen else "intermediate_size"],
        experts=config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
        chosen=config["num_experts_per_tok"], renormalised=config.get("norm_topk_prob", False) if qwen else True,
        balance=config.get("router_aux_loss_coef", 0.001), norm_eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False), bias=config.get("attention_bias", False), qk_norm=qwen,
        window=config.get("sliding_window") if config.get("use_sliding_window", not qwen) else None,
    )  # fmt: skip


def _write(c: Config, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = dict(
        **hf.write_grouped(c), **tables.write_rope(c), num_local_experts=c.experts, num_experts_per_tok=c.chosen,
        router_aux_loss_coef=c.balance, tie_word_embeddings=c.tied, sliding_window=c.window, hidden_act="silu",
    )  # fmt: skip
    if kind == "qwen3_moe":
        config |= dict(
            num_experts=c.experts, moe_intermediate_size=c.mlp_width, norm_topk_prob=c.renormalised,
            attention_bias=c.bias, use_sliding_window=c.window is not None, decoder_sparse_step=1, mlp_only_layers=[],
        )  # fmt: skip
    return config


def _tensors(moe: str, names: str) -> tables.Table:
    layer = "model.layers.{i}."
    return {
        "model.embed_tokens.weight": ("embed_VD", "V D -> V D"),
        layer + "input_layernorm.weight": ("blocks.norm1.scale_D", "D -> D"),
        **tables.attention(layer + "self_attn", "blocks.attn"),
        layer + "post_attention_layernorm.weight": ("blocks.norm2.scale_D", "D -> D"),
        layer + moe + ".gate.weight": ("blocks.moe.router_DE", "E D -> D E"),
        **tables.gated(layer + moe + ".experts.{e}", "blocks.moe", names, experts=True),
        "model.norm.weight": ("norm.scale_D", "D -> D"),
        "lm_head.weight": ("untied_VD", "V D -> V D"),
    }


_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
HF = {
    "mixtral": hf.Format(
        architecture="MixtralForCausalLM", read=_read, write=functools.partial(_write, kind="mixtral"),
        tensors=_tensors("block_sparse_moe", "w1 w3 w2"), prefix="model.", copies=_TIED,
    ),
    "qwen3_moe": hf.Format(
        architecture="Qwen3MoeForCausalLM", read=_read, write=functools.partial(_write, kind="qwen3_moe"),
        tensors=_tensors("mlp", "gate_proj up_proj down_proj"), prefix="model.", copies=_TIED,
    ),
}  # fmt: skip
