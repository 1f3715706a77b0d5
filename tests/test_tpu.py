"""It is a TPU code base: the real train step compiles for topologies that are not here, by libtpu's compiler."""

import dataclasses
import math
import re

import jax
import pytest

from jaxlm import axes, hlo, plan
from jaxlm.data.words import Words
from jaxlm.nn.linear import Head
from jaxlm.nn.loss import cross_entropy
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


SIMPLE = pytest.mark.endurance  # a compilation takes ten seconds, and one of all is in the suite


@pytest.mark.parametrize(
    "mesh", [m if m == "sequence, tensor and fsdp" else pytest.param(m, marks=SIMPLE) for m in MESHES]
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
    _moves_parameters_and_states_only(text, parts.shapes["params"], sizes, B)
    used = {axis for axis in ("fsdp", "stage", "tensor") if axis in sizes}
    used |= {"sequence"} if model == "gpt2" and "sequence" in sizes else set()  # a table of positions has T, too
    assert _axes_used(parts.shapes["params"]) == used
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are not summed over the mesh"
    exchanges = [op.scope for op in hlo.read(text) if op.kind == "all-to-all"]
    if "stage" in sizes:  # where libtpu makes of a sum over tensor an all-to-all of as many bytes, and adds
        exchanges = [scope for scope in exchanges if not scope.endswith("/add")]
    assert bool(exchanges) == ("sequence" in sizes), "tokens are traded for heads where they are split"
    if "stage" in sizes:
        assert "collective-permute" in text, "rows go from stage to stage"
    if "tensor" in sizes:
        assert "all-reduce-scatter" in text or "reduce-scatter(" in text, "each device keeps the sums of its own tokens"


@pytest.mark.endurance
def test_rows_split_over_four_times_the_tpus_take_a_part_of_the_memory_of_each():
    def memory(topology, sizes, attention):
        model, optimizer = MODELS["llama"] | {"attention": attention}, dict(name="adamw")
        config = dict(model=model, optimizer=optimizer, steps=10, batch=4, length=8192, mesh=sizes)
        _, program = plan.compile_step(config, plan.devices(topology), words=Words.of_size(V))
        assert ("collective-permute" in program.as_text()) == (attention == "ring")
        return program.memory_analysis().temp_size_in_bytes

    alone = memory("v5e:2x2", dict(data=4), "auto")
    assert memory("v5e:4x4", dict(data=4, sequence=4), "alltoall") < alone / 4
    assert memory("v5e:4x4", dict(data=4, sequence=4), "ring") < alone / 2


@pytest.mark.endurance
def test_a_weight_is_gathered_before_it_is_used_and_not_sent_around_part_by_part():
    """As libtpu has it, left alone, with parts of 32 columns where a TPU multiplies by 128 or more at once."""
    model = dict(name="llama", layers=2, width=512, heads=4, kv_heads=4, mlp_width=1536)
    mesh, optimizer = dict(data=1, fsdp=16), dict(name="adamw")
    config = dict(model=model, optimizer=optimizer, steps=10, batch=32, length=1024, mesh=mesh)
    _, program = plan.compile_step(config, plan.devices("v5e:4x4"), words=Words.of_size(8192))
    kinds = {op.kind for op in hlo.read(program.as_text())}
    assert "all-gather" in kinds and "collective-permute" not in kinds


@pytest.mark.endurance
def test_what_layers_are_given_may_be_kept_by_the_hosts():
    """A row of 8,192 tokens of width 256 is 4 MB, before each of 8 layers."""

    def memory(remat):
        model, optimizer = MODELS["llama"] | dict(layers=8, remat=remat), dict(name="adamw")
        config = dict(model=model, optimizer=optimizer, steps=10, batch=4, length=8192, mesh=dict(data=4))
        _, program = plan.compile_step(config, plan.devices("v5e:2x2"), words=Words.of_size(V))
        return program.memory_analysis().host_temp_size_in_bytes

    assert memory("full") == 0 and memory("offload") >= 8 * 8192 * 256 * 2


@pytest.mark.endurance
def test_only_the_shards_of_gradients_go_to_other_slices():
    """Summed inside a slice first, so that each device sends what it keeps: the compiler sees to it."""
    model = dict(name="llama", layers=2, width=256, heads=2, kv_heads=2, head_width=128, mlp_width=512)
    mesh = dict(data=2, fsdp=4)
    config = dict(model=model, optimizer=dict(name="sgd", lr=1.0), steps=10, batch=16, length=T, mesh=mesh)
    made = plan.make(config, plan.devices("v5e:2x2", 2), words=Words.of_size(1024), slices=2)
    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512)  # of the layers: their gradients are bfloat16, others float32
    gradients = 2 * matrices + 4 * (made.parameters - matrices)
    across = sum(sent["bytes"] for sent in made.collectives if "data" in sent["axes"])
    assert gradients / 4 <= across < 1.02 * gradients / 4, "all of a gradient for each device's part"


@pytest.mark.endurance
def test_weights_may_be_split_over_slices_which_send_each_other_only_parts():
    """Gathered from the other slice's part before the slice's own, and summed the other way round."""
    model = dict(name="llama", layers=3, width=256, heads=2, kv_heads=2, head_width=128, mlp_width=512, remat="full")
    config = dict(model=model, optimizer=dict(name="adamw"), steps=10, batch=16, length=T, mesh=dict(data=2, fsdp=4))

    def made(**rules):
        config["rules"] = rules
        return plan.make(config, plan.devices("v5e:2x2", 2), words=Words.of_size(8192), slices=2)

    rows, weights = made(), made(D=("fsdp", "data"))
    assert weights.parameter_bytes == pytest.approx(rows.parameter_bytes / 2, rel=0.01)
    assert weights.peak_bytes < rows.peak_bytes
    across = sum(sent["bytes"] for sent in weights.collectives if "data" in sent["axes"])
    assert across < 5 * weights.parameters / 4, "bytes, of what a slice has four devices for"


@pytest.mark.endurance
def test_a_heads_gradient_that_is_split_over_slices_is_held_once():
    """Cut over both axes of the mesh at once, it would be laid out anew, with eight columns where a TPU has 128."""
    where, rules = plan.devices("v5e:4x4", 2), {**axes.RULES, "D": ("fsdp", "data")}
    shapes = dict(x_BTD=((32, T, 512), "bfloat16"), head_VD=((8192, 512), "float32"))
    shapes |= dict(labels_BT=((32, T), "int32"), weights_BT=((32, T), "float32"))
    with axes.on(axes.mesh(data=2, fsdp=16, slices=2, devices=where), rules) as mesh:
        args = {name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()}
        places = axes.shardings(args, mesh, rules)
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in args.items()]
        gradient = jax.grad(lambda x, head, *rest: cross_entropy(x, Head(head), *rest).loss, argnums=1)
        program = jax.jit(gradient, out_shardings=places["head_VD"]).lower(*args).compile()
    assert program.memory_analysis().peak_memory_in_bytes < 1.5 * 8192 * 512 * 4


# Every family, on a mesh that uses all three axes.

COMBINED = dict(data=2, fsdp=2, tensor=4)
SIZES = dict(width=256, heads=4, kv_heads=4, head_width=64, mlp_width=640, layers=2, context=T, experts=4)
OBJECTIVES = {"decoder": "clm", "encoder": "mlm", "encoder-decoder": "denoise"}  # whose targets are as long as sources


@pytest.mark.endurance  # libtpu's programs are never read back from a cache
@pytest.mark.parametrize("name", sorted(set(families.MODELS) - set(MODELS)))
def test_every_other_family_compiles_for_a_tpu_split_by_data_fsdp_and_tensor(name):
    params, text = _step(name, "v5e:4x4", COMBINED, B)
    if hasattr(families.blueprint(name).config, "attention"):
        _attends_by_kernel(text)
    assert _axes_used(params) == {"fsdp", "tensor"}
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are not summed over the mesh"
    _moves_parameters_and_states_only(text, params, COMBINED, B)


EIGHT = {  # other ways to split a model over eight devices: attention, mesh, what must be sent, by whom
    "ring": ("ring", dict(data=2, sequence=4), "collective-permute", ("gpt2", "llama", "mixtral", "bert", "t5")),
    "mixed": ("alltoall", dict(fsdp=2, sequence=2, tensor=2), "all-to-all", ("mixtral", "bert", "t5")),
    "alltoall": ("alltoall", dict(data=2, sequence=4), "all-to-all", ("mixtral", "bert", "t5")),
    "expert": ("auto", dict(data=2, expert=4), "ragged-all-to-all", ("mixtral",)),
    "expert, mixed": ("auto", dict(fsdp=2, expert=2, tensor=2), "ragged-all-to-all", ("mixtral",)),
}


@pytest.mark.endurance
@pytest.mark.parametrize("name, way", [(name, way) for way in EIGHT for name in EIGHT[way][-1]])
def test_tokens_and_experts_that_are_split_compile_for_a_tpu_to_what_they_should(name, way):
    attention, mesh, kind, _ = EIGHT[way]
    params, text = _step(name, "v5e:2x4", mesh, B // 2, attention=attention)
    assert f" {kind}(" in text or f" {kind}-start(" in text
    _moves_parameters_and_states_only(text, params, mesh, B // 2)


def _step(name, topology, mesh, batch, **more):
    """The placed parameters and the program of a family's train step."""
    known = {f.name for f in dataclasses.fields(families.blueprint(name).config)}
    section = {"name": name, **{k: v for k, v in SIZES.items() if k in known}, **more}
    objective = dict(name=OBJECTIVES[families.kind(name)])
    config = dict(
        model=section, objective=objective, optimizer=dict(name="sgd", lr=1.0), steps=10, batch=batch, length=T,
        mesh=mesh,
    )  # fmt: skip
    parts, program = plan.compile_step(config, plan.devices(topology), words=Words.of_size(V))
    return parts.shapes["params"], program.as_text()


def _attends_by_kernel(text):
    calls = re.findall(r'custom_call_target="tpu_custom_call"', text)
    assert len(calls) >= 2, "attention is no kernel, forward or backward"


def _moves_parameters_and_states_only(text, params, sizes, batch):
    """Nothing is gathered that is larger than one layer's largest matrix (of the experts that a device has) or the
    states of the tokens that a layer has on a device (a stack of layers, all devices' tokens), and no logits are sent
    around, whole or a device's part.
    """
    ways = lambda *some: math.prod(sizes.get(axis, 1) for axis in some)  # noqa: E731

    def one(path, x):
        own = ways("expert") if "E" in (axes.of(axes.name_of(path)) or "")[:1] else 1
        return math.prod(x.shape[1:] if "blocks" in jax.tree_util.keystr(path) else x.shape) // own

    largest = max(one(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(params))
    largest = max(largest, batch // ways("data", "stage", "fsdp", "expert") * T // ways("sequence") * SIZES["width"])
    for types, kind in re.findall(r"= ([^=]*?) (all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            lengths = [int(n) for n in shape.split(",") if n]
            assert kind == "all-reduce" or math.prod(lengths) <= largest, f"{kind} of {lengths}"
            logits = {V, V // ways("tensor")} & set(lengths)
            assert not logits or math.prod(lengths) <= largest, f"{kind} of {lengths}: logits"


def _axes_used(params):
    specs = [x.sharding.spec for x in jax.tree.leaves(params)]
    return {axis for spec in specs for to in spec if to for axis in ([to] if isinstance(to, str) else to)}
