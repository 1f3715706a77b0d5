"""It is a TPU code base: the real train step compiles for topologies that are not here, by libtpu's compiler."""

import re

import pytest

from jaxlm import plan

pytest.importorskip("libtpu", reason="the extra `tpu` brings the compiler")

MODELS = {
    "gpt2": dict(name="gpt2", layers=2, width=256, heads=4, context=256),
    "llama": dict(name="llama", layers=2, width=256, heads=4, kv_heads=4, head_width=64, mlp_width=512),
}
MESHES = {
    "data": (1, dict(data=16)),
    "fsdp": (1, dict(data=2, fsdp=8)),
    "tensor": (1, dict(data=4, tensor=4)),
    "two slices": (2, dict(data=4, fsdp=2, tensor=4)),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_the_train_step_compiles_for_a_tpu_with_the_splash_kernel(model, mesh):
    slices, sizes = MESHES[mesh]
    optimizer = dict(name="adamw", weight_decay=0.1, clip=1.0)
    config = dict(model=MODELS[model], optimizer=optimizer, steps=10, batch=32, length=256, mesh=sizes)
    parts, program = plan.compile_step(config, plan.devices("v5e:4x4", slices), vocab=1024, slices=slices)
    assert parts.blueprint.config.dtype == "bfloat16"
    text = program.as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) >= 2, (
        "attention is no kernel, forward or backward"
    )
    split = {"data": {}, "fsdp": {"fsdp"}, "tensor": {"tensor"}, "two slices": {"fsdp", "tensor"}}[mesh]
    assert _axes_used(parts.shapes["params"]) == set(split)
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are not summed over the mesh"


def _axes_used(params):
    import jax

    specs = [x.sharding.spec for x in jax.tree.leaves(params)]
    return {axis for spec in specs for to in spec if to for axis in ([to] if isinstance(to, str) else to)}
