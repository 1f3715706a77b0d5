"""It serves on TPUs: of the engine's decode step, compiled for topologies that are not here, devices keep their part of
the weights and of the cache, and exchange activations.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm import hlo, plan
from jaxlm.data.words import Words
from jaxlm.planning import serving
from jaxlm.planning.arithmetic import held
from tests import test_models as families

pytest.importorskip("libtpu", reason="the extra `tpu` brings the compiler")

ROWS, PROMPT, NEW, V = 8, 384, 128, 512
SIZES = dict(
    layers=2, width=256, heads=8, kv_heads=4, head_width=64, mlp_width=512, context=1024, experts=4, attention="auto"
)
MESHES = {"heads": dict(data=1, tensor=4), "rows and heads": dict(data=2, tensor=4)}
WRITERS = [name for name in families.MODELS if families.kind(name) != "encoder"]


@functools.cache  # a compilation takes ten seconds
def assemble(name, mesh):
    sizes = MESHES[mesh]
    known = {f.name for f in dataclasses.fields(families.blueprint(name).config)}
    model = {"name": name, **{k: v for k, v in SIZES.items() if k in known}}
    where = plan.devices("v5e:2x4" if sizes["data"] > 1 else "v5e:2x2")
    config = dict(model=model, mesh=sizes)
    return serving.assemble(config, where, words=Words.of_size(V), rows=ROWS, prompt=PROMPT, new=NEW)


def simple(name, mesh):
    return pytest.param(name, mesh, marks=() if (name, mesh) == ("llama", "rows and heads") else pytest.mark.endurance)


@pytest.mark.parametrize("name, mesh", [simple(name, mesh) for name in WRITERS for mesh in MESHES])
def test_a_decode_step_exchanges_activations_and_no_cache_and_no_weights(name, mesh):
    served = assemble(name, mesh)
    assert served.decode is not None
    most = ROWS * V * 4  # logits of every row, in float32; hidden states are as many
    layer = min(x.size * x.dtype.itemsize // len(x) for x in jax.tree.leaves(served.state.cache) if x.ndim == 5)
    assert most < layer / 8, "of what a device has of one layer's cache, it is little"
    sent = [op for op in hlo.read(served.decode.as_text() or "") if op.kind in hlo.COLLECTIVES]
    assert sent, "heads are split, so what they find is summed"
    for op in sent:
        assert op.bytes <= most, f"{op.kind} of {op.sizes}, asked for by {op.source}"


@pytest.mark.parametrize("name, mesh", [simple(name, mesh) for name in WRITERS for mesh in MESHES])
def test_a_device_holds_its_part_of_the_weights_in_the_dtype_of_products(name, mesh):
    served = assemble(name, mesh)
    assert served.decode is not None
    wide = [x for path, x in jax.tree_util.tree_leaves_with_path(served.params) if x.dtype == jnp.float32]
    assert sum(x.size for x in wide) < 0.02 * served.blueprint.size, "norms, biases and routers"
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(served.params))
    assert held(served.params) < 1.05 * 2 * own and own < 0.4 * served.blueprint.size
    given = served.decode.memory_analysis()
    assert given is not None
    assert given.argument_size_in_bytes < 1.1 * (held(served.params) + held(served.state)) + 2**20


@pytest.mark.parametrize("name, mesh", [simple(name, mesh) for name in ("gpt2", "llama") for mesh in MESHES])
def test_prompts_are_read_by_the_kernel(name, mesh):
    served = assemble(name, mesh)
    assert served.prefill is not None
    calls = [op for op in hlo.read(served.prefill.as_text() or "") if "seen_" in op.scope]
    assert calls, "the cache is empty, so a prompt looks at itself alone"
