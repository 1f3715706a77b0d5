"""It is a TPU code base: the real train step compiles for topologies that are not here, by libtpu's compiler."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import pytest

from jaxlm import axes, plan
from jaxlm.data.words import Words
from jaxlm.models import Blueprint
from tests import test_models as families

pytest.importorskip("libtpu", reason="the extra `tpu` brings the compiler")

B, T, V = 48, 128, 768  # so that a device's logits are larger than any matrix

MODELS = {
    "gpt2": dict(name="gpt2", layers=2, width=256, heads=4, context=T),
    "llama": dict(name="llama", layers=2, width=256, heads=4, kv_heads=4, head_width=64, mlp_width=512),
}
MESHES = {
    "data": (1, dict(data=16)),
    "fsdp": (1, dict(data=2, fsdp=8)),
    "tensor": (1, dict(data=4, tensor=4)),
    "sequence": (1, dict(data=4, sequence=4)),
    "sequence, tensor and fsdp": (1, dict(fsdp=4, sequence=2, tensor=2)),
    "stages": (1, dict(stage=2, fsdp=2, tensor=4)),
    "two slices": (2, dict(data=4, fsdp=2, tensor=4)),
}


SIMPLE = pytest.mark.endurance  # the others split by all that these do


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=SIMPLE) if m in ("data", "fsdp", "sequence", "stages") else m for m in MESHES]
)
@pytest.mark.parametrize("model", [pytest.param(m, marks=SIMPLE) if m == "gpt2" else m for m in MODELS])
def test_the_train_step_compiles_for_a_tpu_with_the_splash_kernel(model, mesh):
    slices, sizes = MESHES[mesh]
    optimizer = dict(name="adamw", weight_decay=0.1, clip=1.0)
    config = dict(model=MODELS[model], optimizer=optimizer, steps=10, batch=B, length=T, mesh=sizes)
    parts, program = plan.compile_step(config, plan.devices("v5e:4x4", slices), words=Words.of_size(V), slices=slices)
    assert parts.blueprint.config.dtype == "bfloat16"
    text = program.as_text()
    _attends_by_kernel(text)
    _moves_parameters_and_states_only(text, parts.shapes["params"], sizes)
    used = {axis for axis in ("fsdp", "stage", "tensor") if axis in sizes}
    used |= {"sequence"} if model == "gpt2" and "sequence" in sizes else set()  # a table of positions has T, too
    assert _axes_used(parts.shapes["params"]) == used
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are not summed over the mesh"
    assert ("all-to-all" in text) == ("sequence" in sizes), "tokens are traded for heads where they are split"
    if "stage" in sizes:
        assert "collective-permute" in text, "rows go from stage to stage"
    if "tensor" in sizes:
        assert "all-reduce-scatter" in text or "reduce-scatter(" in text, "each device keeps the sums of its own tokens"


@pytest.mark.endurance
def test_rows_split_over_four_times_the_tpus_take_a_part_of_the_memory_of_each():
    def memory(topology, sizes, attention):
        model, optimizer = MODELS["llama"] | {"attention": attention}, dict(name="adamw")
        config = dict(model=model, optimizer=optimizer, steps=10, batch=4, length=4096, mesh=sizes)
        _, program = plan.compile_step(config, plan.devices(topology), words=Words.of_size(V))
        assert ("collective-permute" in program.as_text()) == (attention == "ring")
        return program.memory_analysis().temp_size_in_bytes

    alone = memory("v5e:2x2", dict(data=4), "auto")
    assert memory("v5e:4x4", dict(data=4, sequence=4), "alltoall") < alone / 4
    assert memory("v5e:4x4", dict(data=4, sequence=4), "ring") < alone / 2


# Every family, on a mesh that uses all three axes.

COMBINED = dict(data=2, fsdp=2, tensor=4)
SIZES = dict(width=256, heads=4, kv_heads=4, head_width=64, mlp_width=640, layers=2, context=T, experts=4)


@pytest.mark.endurance  # libtpu's programs are never read back from a cache
@pytest.mark.parametrize("name", sorted(set(families.MODELS) - set(MODELS)))
def test_every_other_family_compiles_for_a_tpu_split_by_data_fsdp_and_tensor(name):
    known = {f.name for f in dataclasses.fields(families.blueprint(name).config)}
    section = {"name": name, **{k: v for k, v in SIZES.items() if k in known}}
    compiled = _step if families.kind(name) == "decoder" else _gradient
    params, text = compiled(section, plan.devices("v5e:4x4"))
    if "attention" in known:
        _attends_by_kernel(text)
    assert _axes_used(params) == {"fsdp", "tensor"}
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are not summed over the mesh"
    _moves_parameters_and_states_only(text, params, COMBINED)


def _step(section, devices):
    """The placed parameters and the program of a real train step."""
    optimizer = dict(name="adamw", weight_decay=0.1, clip=1.0)
    config = dict(model=section, optimizer=optimizer, steps=10, batch=B, length=T, mesh=COMBINED)
    parts, program = plan.compile_step(config, devices, words=Words.of_size(V))
    return parts.shapes["params"], program.as_text()


def _gradient(section, devices):
    """The same of a gradient by all logits, for a family that no objective trains yet."""
    model, mesh = Blueprint.of(section, vocab=V, dtype="bfloat16"), axes.mesh(**COMBINED, devices=devices)

    def loss(params, tokens_BT, segments_BT):
        logits_BTV = families.read(model.bind(params), tokens_BT, segments_BT)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[..., None], -1).mean()

    with axes.on(mesh):
        put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        params = jax.tree.map(put, model.shapes, axes.shardings(model.shapes, mesh))
        rows = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=NamedSharding(mesh, axes.spec("B", (B,), mesh)))
        return params, jax.jit(jax.value_and_grad(loss)).lower(params, rows, rows).compile().as_text()


def _attends_by_kernel(text):
    calls = re.findall(r'custom_call_target="tpu_custom_call"', text)
    assert len(calls) >= 2, "attention is no kernel, forward or backward"


def _moves_parameters_and_states_only(text, params, sizes):
    """Nothing is gathered that is larger than one layer's largest matrix or the states of the tokens that a layer has
    on a device (a stack of layers, all devices' tokens), and no logits are sent around, whole or a device's part.
    """
    ways = lambda *some: math.prod(sizes.get(axis, 1) for axis in some)  # noqa: E731
    rows, tokens = ways("data", "stage", "fsdp"), ways("sequence")
    shapes = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
    largest = max(math.prod(shape[1:] if "blocks" in name else shape) for name, shape in shapes.items())
    largest = max(largest, B // rows * T // tokens * SIZES["width"])
    for types, kind in re.findall(r"= ([^=]*?) (all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            lengths = [int(n) for n in shape.split(",") if n]
            assert kind == "all-reduce" or math.prod(lengths) <= largest, f"{kind} of {lengths}"
            assert not {V, V // 4} & set(lengths) or math.prod(lengths) <= largest, f"{kind} of {lengths}: logits"


def _axes_used(params):
    specs = [x.sharding.spec for x in jax.tree.leaves(params)]
    return {axis for spec in specs for to in spec if to for axis in ([to] if isinstance(to, str) else to)}
