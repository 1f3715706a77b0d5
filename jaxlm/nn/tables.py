"""What `nn`'s layers are called in Hugging Face files: tensors, as lines of a family's table (see `jaxlm.hf`), and in
config.json rotary positions.

    attention("model.layers.{i}.self_attn", "blocks.attn")
        "model.layers.{i}.self_attn.q_proj.weight": ("blocks.attn.wq_DNH", "(N H) D -> D N H"), ...

A table may name more than a model has, a bias for instance.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.lookup import Mistake

Table = dict[str, tuple[str, str]]


def attention(theirs: str, ours: str, names: str = "q_proj k_proj v_proj o_proj") -> Table:
    """The tensors of `attention.Attention` at `ours`; `names` are those of q, k, v and output at `theirs`."""
    q, k, v, o = (f"{theirs}.{name}" for name in names.split())
    return {
        f"{q}.weight": (f"{ours}.wq_DNH", "(N H) D -> D N H"),
        f"{k}.weight": (f"{ours}.wk_DKH", "(K H) D -> D K H"),
        f"{v}.weight": (f"{ours}.wv_DKH", "(K H) D -> D K H"),
        f"{o}.weight": (f"{ours}.wo_NHD", "D (N H) -> N H D"),
        f"{q}.bias": (f"{ours}.bias_q_NH", "(N H) -> N H"),
        f"{k}.bias": (f"{ours}.bias_k_KH", "(K H) -> K H"),
        f"{v}.bias": (f"{ours}.bias_v_KH", "(K H) -> K H"),
        f"{o}.bias": (f"{ours}.bias_D", "D -> D"),
        f"{theirs}.q_norm.weight": (f"{ours}.q_norm.scale_H", "H -> H"),
        f"{theirs}.k_norm.weight": (f"{ours}.k_norm.scale_H", "H -> H"),
    }


def mlp(up: str, down: str, ours: str) -> Table:
    """The tensors of `mlp.MLP` at `ours`."""
    return {
        f"{up}.weight": (f"{ours}.up_DF", "F D -> D F"),
        f"{up}.bias": (f"{ours}.bias_F", "F -> F"),
        f"{down}.weight": (f"{ours}.down_FD", "D F -> F D"),
        f"{down}.bias": (f"{ours}.bias_D", "D -> D"),
    }


def gated(theirs: str, ours: str, names: str = "gate_proj up_proj down_proj", *, experts: bool = False) -> Table:
    """The tensors of `mlp.GatedMLP` at `ours`, or of one of the experts of `moe.MoE`; `names` as of `attention`."""
    (gate, up, down), E = (f"{theirs}.{name}.weight" for name in names.split()), "E" * experts
    return {
        gate: (f"{ours}.gate_{E}DF", "F D -> D F"),
        up: (f"{ours}.up_{E}DF", "F D -> D F"),
        down: (f"{ours}.down_{E}FD", "D F -> F D"),
    }


def norms(names: Mapping[str, str]) -> Table:
    """The tensors of norms with or without biases, from their names to ours."""
    both = {f"{theirs}.weight": (f"{ours}.scale_D", "D -> D") for theirs, ours in names.items()}
    return both | {f"{theirs}.bias": (f"{ours}.bias_D", "D -> D") for theirs, ours in names.items()}


def masked(dense: str, norm: str, bias: str) -> Table:
    """What a model has for masked tokens: see `masked.transformed`, and the bias of the head."""
    return {
        f"{dense}.weight": ("transform.w_DD", "out D -> D out"),
        f"{dense}.bias": ("transform.bias_D", "D -> D"),
        bias: ("bias_V", "V -> V"),
        **norms({norm: "transform_norm"}),
    }


def read_rope(config: Mapping[str, Any], which: str | None = None) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` from a config.json, as transformers 5 writes it or older ones did; `which` of
    several kinds of layers.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if which in rope:
        rope = rope[which]
    base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return dict(rope_base=base)
    known = dict(
        factor="factor", low_freq="low_freq_factor", high_freq="high_freq_factor", beta_fast="beta_fast",
        beta_slow="beta_slow", attention="attention_factor", original="original_max_position_embeddings",
    )  # fmt: skip
    extra = set(rope) - set(known.values()) - {"rope_theta", "rope_type", "type", "truncate"}
    if kind not in ("linear", "llama3", "yarn") or rope.get("truncate") is False or any(rope[k] for k in extra):
        raise Mistake(f"config.json: rope_parameters {dict(rope)} are none that jaxlm knows: linear, llama3, yarn")
    scaling = dict(kind=kind, original=config["max_position_embeddings"] if kind == "yarn" else 0)
    scaling |= {ours: rope[theirs] for ours, theirs in known.items() if rope.get(theirs) is not None}
    return dict(rope_base=base, rope_scaling={k: v for k, v in scaling.items() if v is not None})


def write_rope(c: Any) -> dict[str, Any]:
    """The same for export, from a Config with `rope_base` and `rope_scaling`."""
    rope: dict[str, Any] = dict(rope_theta=c.rope_base, rope_type="default")
    if s := c.rope_scaling:
        rope |= dict(rope_type=s.kind, factor=s.factor)
        if s.kind != "linear":
            rope["original_max_position_embeddings"] = s.original
        if s.kind == "llama3":
            rope |= dict(low_freq_factor=s.low_freq, high_freq_factor=s.high_freq)
        if s.kind == "yarn":
            rope |= dict(beta_fast=s.beta_fast, beta_slow=s.beta_slow, attention_factor=s.attention)
    return dict(rope_parameters={key: value for key, value in rope.items() if value is not None})
