"""Rows whose tokens lie on several devices: the same losses and gradients, and no more sent than is needed.

Where `tensor` alone splits them it is tests/test_models.py that shows it, for every family.
"""

import re

import jax
import numpy as np
import pytest

from jaxlm import axes
from tests import test_models as families
from tests.trees import noisy

T = 16  # four tokens a device: halves of a row's parts, which a balanced ring exchanges
NAMES = ("gpt2", "llama", "mixtral", "bert", "t5")
WAYS = {  # meshes of eight devices, and how tokens find each other
    "ring": (dict(data=2, sequence=4), "ring"),
    "alltoall": (dict(data=2, sequence=4), "alltoall"),
    "with tensor and fsdp": (dict(fsdp=2, sequence=2, tensor=2), "auto"),
    "ring, with tensor and fsdp": (dict(fsdp=2, sequence=2, tensor=2), "ring"),
    "with tensor and expert": (dict(expert=2, sequence=2, tensor=2), "auto"),
}


@pytest.mark.parametrize(
    "name, way", [(n, w) for w in WAYS for n in NAMES if "expert" not in WAYS[w][0] or n == "mixtral"]
)
def test_loss_and_gradients_are_those_of_one_device(name, way):
    params, batch = noisy(families.blueprint(name)), families.packed(T)
    want, want_grads = families.gradient(name)(params, batch)
    sizes, attention = WAYS[way]
    mesh = axes.mesh(**sizes)
    with axes.on(mesh):
        placed = jax.device_put(params, axes.shardings(params, mesh))
        run = jax.jit(families.gradient_of(name, attention=attention))
        got, grads = run(placed, axes.put(batch, len(batch["tokens"]), mesh))
    assert got == pytest.approx(float(want), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want_grads)


LONG = 1024


def compiled(name, sizes, attention):
    """The program of loss and gradients for two long rows."""
    mesh, model = axes.mesh(**sizes), families.blueprint(name, context=LONG, attention=attention)
    ids = np.ones((2, LONG), np.int32)
    rows = dict(tokens=ids, segments=ids, labels=ids, weights=ids.astype(np.float32))
    with axes.on(mesh):
        place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)  # noqa: E731
        params = jax.tree.map(place, model.shapes, axes.shardings(model.shapes, mesh))
        run = jax.value_and_grad(lambda p, batch: families.objective(model.bind(p), batch))
        return jax.jit(run).lower(params, axes.put(rows, 2, mesh)).compile()


@pytest.mark.endurance
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_four_times_the_devices_hold_a_part_of_a_row_each(name):
    """A ring holds blocks of scores instead of a row's, so it takes far less than a fourth; heads that are traded hold
    all scores of a head.
    """
    memory = {
        way: compiled(name, sizes, way).memory_analysis().temp_size_in_bytes
        for way, sizes in dict(
            xla=dict(data=2), ring=dict(data=2, sequence=4), alltoall=dict(data=2, sequence=4)
        ).items()
    }
    assert memory["ring"] < memory["xla"] / 10 and memory["alltoall"] < memory["xla"] / 2.5, memory


@pytest.mark.parametrize("way, kind", [("ring", "collective-permute"), ("alltoall", "all-to-all")])
def test_nothing_is_gathered_where_tokens_alone_are_split(way, kind):
    text = compiled("llama", dict(data=2, sequence=4), way).as_text()
    assert kind in text and "all-gather" not in text
    states = LONG // 4 * families.SIZES["width"]  # of a device's tokens
    for types in re.findall(rf"= ([^=]*?) {kind}(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            assert np.prod([int(n) for n in shape.split(",")]) <= states, shape
