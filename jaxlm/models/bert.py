"""BERT: an encoder that sees both sides, with heads for masked tokens and for the next sentence (arXiv:1810.04805).

RoBERTa (arXiv:1907.11692) and DistilBERT (arXiv:1910.01108) differ in settings alone. ELECTRA (arXiv:2003.10555) has a
`generator`: fewer layers on the same embeddings, which the head for masked tokens then reads.

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
from jaxlm.nn.linear import Head, dense, dropout, embed, normal, stream, zeros
from jaxlm.nn.mask import Mask
from jaxlm.nn.masked import Replaced, transformed
from jaxlm.nn.mlp import GELU, MLP, Dense
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.stack import scan, stacked

KIND = "encoder"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are BERT-base's.

    Drawn by 0.02; Google's code for BERT also cuts at two standard deviations, which transformers does not.
    """

    vocab: int
    context: int = 512
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    types: int = 2  # token types (sentence A or B); 0 for none
    skipped: int = 0  # rows of the position table that no token uses: RoBERTa begins at 2
    norm_eps: float = 1e-12
    masked: bool = True  # the head that predicts masked tokens
    pooled: bool = True  # the first token's state through a layer of its own
    next: bool = True  # the head that tells from it whether the second sentence follows the first
    generator: int = 0  # layers that guess masked tokens, for ELECTRA; the model's own tell which tokens are guesses
    dropout: float = 0.0
    attention: str = "auto"
    remat: str = "none"  # none, dots, full or offload (`nn.stack.REMAT`)
    dtype: str = "float32"  # what products are computed in; parameters are float32

    def __post_init__(self):
        if self.next and not self.pooled:
            raise Mistake("config.model: next=True reads the pooled state; set pooled=True too")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Block(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.attn = Attention(
            c.width, c.heads, c.heads, c.head_width, bias=True, backend=c.attention, std=0.02, out_std=0.02, rngs=rngs
        )
        self.mlp = MLP(c.width, c.mlp_width, GELU, std=0.02, out_std=0.02, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm(c.width, c.norm_eps), LayerNorm(c.width, c.norm_eps)
        self.dropout, self.dtype = c.dropout, jnp.dtype(c.dtype)

    @shaped
    def __call__(self, x_BTD, mask, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, _ = self.attn(x_BTD.astype(self.dtype), mask)
        x_BTD = self.norm1(x_BTD + dropout(y_BTD, self.dropout, keys[0]), stream(self.dtype))
        y_BTD = self.mlp(x_BTD.astype(self.dtype))
        x_BTD = self.norm2(x_BTD + dropout(y_BTD, self.dropout, keys[1]), stream(self.dtype))
        return axes.constrain(x_BTD, "BTD")


class Model(nnx.Module):
    """Token ids to hidden states, to logits of masked tokens, to a pooled state."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embed_VD = normal(rngs, c.vocab, c.width, std=0.02)
        self.positions_TD = normal(rngs, c.context + c.skipped, c.width, std=0.02)
        self.types_CD = normal(rngs, c.types, c.width, std=0.02) if c.types else None
        self.norm = LayerNorm(c.width, c.norm_eps)
        self.blocks = stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.transform = Dense(c.width, rngs=rngs) if c.masked else None
        self.transform_norm = LayerNorm(c.width, c.norm_eps) if c.masked else None
        self.bias_V = zeros(c.vocab) if c.masked else None
        self.pooler = Dense(c.width, rngs=rngs) if c.pooled else None
        self.next_DC = normal(rngs, c.width, 2, std=0.02) if c.next else None
        self.next_C = zeros(2) if c.next else None
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
            raise Mistake(f"bert: {tokens_BT.shape[1]} tokens, but config.model.context={c.context}")
        if types_BT is not None and self.types_CD is None:
            raise Mistake("this model has no token types (config.model.types=0)")
        if positions_BT is None:
            positions_BT = positions.of(tokens_BT, segments_BT)
        keys = [None] * 2 if key is None else [jax.random.fold_in(key, layers), jax.random.split(key, layers)]
        x_BTD = embed(self.embed_VD, tokens_BT, c.dtype) + embed(self.positions_TD, positions_BT + c.skipped, c.dtype)
        if self.types_CD is not None:
            x_BTD += embed(self.types_CD, jnp.zeros_like(tokens_BT) if types_BT is None else types_BT, c.dtype)
        x_BTD = axes.constrain(dropout(self.norm(x_BTD, stream(c.dtype)), c.dropout, keys[0]), "BTD")
        mask = Mask(causal=False, segments_BT=segments_BT)
        step = lambda block, x_BTD, mask, key: block(x_BTD, mask, key)  # noqa: E731
        x_BTD = scan(blocks, x_BTD, step, keys[1], rows=mask, remat=c.remat)
        return x_BTD.astype(c.dtype), None

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
        """The pooled state [B, D] of each row, from its first token."""
        if self.pooler is None:
            raise Mistake("this model has no pooled state (config.model.pooled=False)")
        return jnp.tanh(self.pooler(x_BTD[:, 0]))

    @shaped
    def follows(self, pooled_BD):
        """Logits [B, 2] in float32: the second sentence follows the first, or comes from elsewhere."""
        if self.next_DC is None:
            raise Mistake("this model has no head for the next sentence (config.model.next=False)")
        return dense(pooled_BD, self.next_DC, self.next_C).astype(jnp.float32)


_LARGE = dict(layers=24, width=1024, heads=16, mlp_width=4096)
_ROBERTA = dict(types=1, skipped=2, norm_eps=1e-5, pooled=False, next=False)
SIZES = {
    "bert-base": {},
    "bert-large": _LARGE,
    "roberta-base": _ROBERTA,
    "roberta-large": _LARGE | _ROBERTA,
    "distilbert-base": dict(layers=6, types=0, pooled=False, next=False),
}


def _read_bert(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    skipped = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    return hf.read_sizes(config) | dict(
        context=config["max_position_embeddings"] - skipped, skipped=skipped, types=config["type_vocab_size"],
        norm_eps=config["layer_norm_eps"],
        masked=any(name.endswith(("cls.predictions.bias", "lm_head.bias")) for name in names),
        pooled=any("pooler.dense" in name for name in names), next=any("seq_relationship" in name for name in names),
    )  # fmt: skip


def _write_bert(c: Config) -> dict[str, Any]:
    if not c.types:
        raise Mistake("it has token types, one at least")
    padding = dict(pad_token_id=c.skipped - 1) if c.skipped else {}  # RoBERTa's positions count from there
    sizes = hf.write_sizes(c) | dict(max_position_embeddings=c.context + c.skipped)
    return padding | sizes | dict(type_vocab_size=c.types, layer_norm_eps=c.norm_eps, hidden_act="gelu")


_DISTILLED_SIZES = dict(
    context="max_position_embeddings", layers="n_layers", width="dim", heads="n_heads", mlp_width="hidden_dim"
)


def _read_distilbert(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    hf.require(config, activation="gelu")
    own = dict(types=0, norm_eps=1e-12, pooled=False, next=False, masked="vocab_projector.bias" in names)
    return hf.read_sizes(config, _DISTILLED_SIZES) | own


def _write_distilbert(c: Config) -> dict[str, Any]:
    return hf.write_sizes(c, _DISTILLED_SIZES) | dict(activation="gelu")


def _tensors(body: str, layer: str, names: str) -> tables.Table:
    """The encoder's tensors; `names` are those of the layer's parts, in the order below."""
    *attention, norm1, up, down, norm2 = names.split()
    norm1, up, down, norm2 = (f"{layer}.{name}" for name in (norm1, up, down, norm2))
    table = {
        f"{body}.embeddings.word_embeddings.weight": ("embed_VD", "V D -> V D"),
        f"{body}.embeddings.position_embeddings.weight": ("positions_TD", "T D -> T D"),
        f"{body}.embeddings.token_type_embeddings.weight": ("types_CD", "C D -> C D"),
        f"{body}.pooler.dense.weight": ("pooler.w_DD", "out D -> D out"),
        f"{body}.pooler.dense.bias": ("pooler.bias_D", "D -> D"),
        **tables.attention(layer, "blocks.attn", " ".join(attention)),
        **tables.mlp(up, down, "blocks.mlp"),
    }
    return table | tables.norms({f"{body}.embeddings.LayerNorm": "norm", norm1: "blocks.norm1", norm2: "blocks.norm2"})


_CLS = "cls.predictions"
_PARTS = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense attention.output.LayerNorm "
    "intermediate.dense output.dense output.LayerNorm"
)
_DISTILLED = (
    "attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm "
    "ffn.lin1 ffn.lin2 output_layer_norm"
)
HF = {
    "bert": hf.Format(
        architecture=lambda c: "BertForPreTraining" if c.next else "BertForMaskedLM" if c.masked else "BertModel",
        read=_read_bert, write=_write_bert, prefix="bert.", ignored=(r".*embeddings\.position_ids",),
        copies={
            f"{_CLS}.decoder.weight": "bert.embeddings.word_embeddings.weight",
            f"{_CLS}.decoder.bias": f"{_CLS}.bias",
        },
        tensors={
            **_tensors("bert", "bert.encoder.layer.{i}", _PARTS),
            **tables.masked(f"{_CLS}.transform.dense", f"{_CLS}.transform.LayerNorm", f"{_CLS}.bias"),
            "cls.seq_relationship.weight": ("next_DC", "C D -> D C"),
            "cls.seq_relationship.bias": ("next_C", "C -> C"),
        },
    ),
    "roberta": hf.Format(
        architecture=lambda c: "RobertaForMaskedLM" if c.masked else "RobertaModel",
        read=_read_bert, write=_write_bert, prefix="roberta.", ignored=(r".*embeddings\.position_ids",),
        copies={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        tensors={
            **_tensors("roberta", "roberta.encoder.layer.{i}", _PARTS),
            **tables.masked("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        },
    ),
    "distilbert": hf.Format(
        architecture=lambda c: "DistilBertForMaskedLM" if c.masked else "DistilBertModel",
        read=_read_distilbert, write=_write_distilbert, prefix="distilbert.",
        copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        tensors={
            **_tensors("distilbert", "distilbert.transformer.layer.{i}", _DISTILLED),
            **tables.masked("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        },
    ),
}  # fmt: skip
