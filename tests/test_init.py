"""A fresh model is drawn as its paper, or the code of those who wrote it, says: statistics of every kind of parameter.

A new family needs a row in `ROWS`: what its parameters' standard deviations are, and where that stands.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxlm.models import Blueprint
from tests.test_models import MODELS, blueprint, read

V = 1024
SIZES = dict(layers=3, width=256, heads=4, kv_heads=2, head_width=64, mlp_width=320, context=128, experts=4)
Std = float | Callable[[Any], float]  # a number, or a function of the config


class Row(NamedTuple):
    """One family with some settings. Patterns match a parameter's whole path."""

    model: Mapping[str, Any]
    stds: Mapping[str, Std]
    logits: Std  # standard deviation of a fresh model's logits
    constant: Mapping[str, float] = {r".*scale_\w+": 1.0, r".*\bbias_\w+|next_C": 0.0}


def residual(c: Any) -> float:
    """GPT-2's paper, section 2.3: what is added to the residual stream, by the root of how often that is done."""
    return 0.02 * (2 * c.layers) ** -0.5


def tied(c: Any) -> float:
    """Logits of a normed state with rows drawn at 0.02."""
    return 0.02 * c.width**0.5


# Neither paper says how; as GPT-2, which is also how Meta trains Llama 3 in torchtitan. transformers: 0.02 throughout.
LLAMA = {
    r"(embed|untied)_VD|.*\.(w[qkv]_D[NK]H|(gate|up)_E?DF|router_DE)": 0.02,
    r".*\.(wo_NHD|down_E?FD)": residual,
}
# Mesh-TensorFlow, with which the paper's models were trained: attention.py (AttentionParams) for attention, and its
# dense layers' variance scaling over what goes in; the table of distances by TensorFlow's default, Glorot's.
T5 = {
    "embed_VD": 1.0,
    r".*\.wq_DNH": lambda c: (c.width * c.head_width) ** -0.5,
    r".*\.(w[kv]_DKH|(in|gate|up)_DF)|untied_VD": lambda c: c.width**-0.5,
    r".*\.wo_NHD": lambda c: (c.heads * c.head_width) ** -0.5,
    r".*\.down_FD": lambda c: c.mlp_width**-0.5,
    r".*\.table_CN": lambda c: (2 / (c.buckets + c.heads)) ** 0.5,
}
ROWS = {
    # OpenAI's code (model.py) draws positions at 0.01; GPT-1's paper, section 4.1, and transformers at 0.02.
    "gpt2": Row(
        {"name": "gpt2"},
        {r"(embed_V|positions_T)D|.*\.(w[qkv]_D[NK]H|up_DF)": 0.02, r".*\.(wo_NHD|down_FD)": residual},
        logits=tied,
    ),
    "llama": Row({"name": "llama", "bias": "all", "qk_norm": True}, LLAMA, logits=tied),
    "mixtral": Row({"name": "mixtral"}, LLAMA, logits=tied),
    # The papers are silent; transformers' 0.02. DeepMind's own code, which trains from no fresh model, has Flax's 0.01.
    # A scale is kept as its difference from 1.
    "gemma": Row({"name": "gemma", "qk_norm": True}, {".*": 0.02}, logits=tied, constant={r".*scale_\w+": 0.0}),
    # Google's code (modeling.py, create_initializer) at 0.02, cut at two deviations; transformers does not cut.
    "bert": Row({"name": "bert"}, {".*": 0.02}, logits=tied),
    # arXiv:2412.13663, section 2.2: as Megatron, which is GPT-2's way (arXiv:1909.08053, section 4.2).
    "modernbert": Row(
        {"name": "modernbert"},
        {r"embed_VD|.*\.(w[qkv]_D[NK]H|(gate|up)_DF|w_DD)": 0.02, r".*\.(wo_NHD|down_FD)": residual},
        logits=tied,
    ),
    "t5": Row({"name": "t5", "mlp": "relu", "tied": True, "scaled": True}, T5, logits=1.0),
    "t5-1.1": Row({"name": "t5"}, T5, logits=1.0),
    # fairseq, in which BART was written: init_bert_params, for all layers and tables.
    "bart": Row({"name": "bart"}, {".*": 0.02}, logits=tied),
    # arXiv:1409.2329 draws uniformly from +-0.05 for 650 units and +-0.04 for 1,500: about width ** -0.5. Embeddings
    # are drawn larger, since no norm enlarges them. The logits' size is what this gives; no paper says it.
    "rnn": Row(
        {"name": "rnn", "cell": "gru"},
        {"embed_VD": 0.25, r"untied_VD|.*\.(input|recur)_DGF": lambda c: c.width**-0.5},
        logits=0.115,
    ),
}


def test_every_family_has_a_row():
    missing = set(MODELS) - {row.model["name"] for row in ROWS.values()}
    assert not missing, f"tests/test_init.py: say in ROWS how {', '.join(missing)} is drawn, and where that stands"


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture(scope="module")
def model(row):
    known = blueprint(row.model["name"]).config.__dataclass_fields__
    return Blueprint.of({**{k: v for k, v in SIZES.items() if k in known}, **row.model}, vocab=V)


@pytest.fixture(scope="module")
def params(model):
    return model.init(seed=0)


def test_parameters_are_drawn_as_the_paper_says(row, model, params):
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name, x = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(x)
        if (value := _look_up(row.constant, name)) is not None:
            assert (x == value).all(), name
            continue
        std = _look_up(row.stds, name)
        assert std is not None, f"{name}: no pattern of its row says how it is drawn"
        std = std if isinstance(std, float) else std(model.config)
        chance = 5 * std * x.size**-0.5  # five deviations of a mean of so many; of their deviation, more than five
        assert x.std() == pytest.approx(std, abs=chance), name
        assert x.mean() == pytest.approx(0.0, abs=chance), name


def test_every_pattern_is_of_some_parameter(row, params):
    names = [
        jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for pattern in row.stds:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_a_fresh_models_logits_are_of_a_sensible_size(row, model, params):
    tokens_BT = jax.random.randint(jax.random.key(0), (4, 64), 0, V)
    logits_BTV = np.asarray(jax.jit(lambda p, t: read(model.bind(p), t))(params, tokens_BT))
    want = row.logits if isinstance(row.logits, float) else row.logits(model.config)
    assert logits_BTV.std() == pytest.approx(want, rel=0.25)
    assert abs(logits_BTV.mean()) < 0.1 * want


def _look_up(table, name):
    """What the first pattern says that matches the whole name; None where none does."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)
