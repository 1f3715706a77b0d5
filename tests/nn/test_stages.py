"""Layers on several stages: the losses and gradients of one device, whatever rows, layers and rounds there are."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn import pipeline
from jaxlm.nn.linear import dropout, normal
from jaxlm.nn.stack import scan, stacked
from tests import test_models as families
from tests.trees import noisy

B, T, D = 16, 12, 4


class Layer(nnx.Module):
    """Small, and no two layers commute."""

    def __init__(self, rngs):
        self.square_DD, self.scale_D = normal(rngs, D, D, std=1.0), normal(rngs, D, std=1.0)

    def __call__(self, x_BD, read_B, layer):
        return jnp.tanh(x_BD @ self.square_DD[...] + self.scale_D[...][None] * read_B[:, None] * (1 + layer))


def toy(layers, step, remat="none", per_layer=None, kinds=None):
    """Loss and gradients of layers in a row, by parameters and rows, and the parameters."""
    graph, state = nnx.split(stacked(lambda rngs: Layer(rngs), layers, nnx.Rngs(0)))

    def loss(params, x_BD, read_B):
        per = np.arange(layers) if per_layer is None else per_layer
        out = scan(nnx.merge(graph, params), x_BD, step, per, rows=read_B, remat=remat, kinds=kinds)
        return (out * jnp.arange(out.size).reshape(out.shape)).sum() / out.size, out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), nnx.to_pure_dict(state)


def plain(block, x_BD, read_B, layer):
    return block(x_BD, read_B, layer)


def rows():
    return np.random.default_rng(0).normal(size=(B, D)).astype(np.float32), np.arange(B, dtype=np.float32)


def staged(run, params, schedule=pipeline.USUAL, **sizes):
    mesh = axes.mesh(**{"data": 1, **sizes})
    with axes.on(mesh), pipeline.on(schedule):
        put = axes.put(dict(zip("xr", rows())), B, mesh)
        return run(jax.device_put(params, axes.shardings(params, mesh)), put["x"], put["r"])


def close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


slow = pytest.mark.endurance
ROUNDS = [(2, 1, 6), (4, 2, 8), *(pytest.param(*one, marks=slow) for one in [(2, 2, 8), (2, 3, 6), (4, 6, 24)])]


@pytest.mark.parametrize("stages, repeats, layers", ROUNDS)
def test_every_layer_meets_every_row_in_its_turn(stages, repeats, layers):
    """Stages and repeats with and without a common divisor, and a chunk of more than one layer."""
    run, params = toy(layers, plain, "full" if repeats > 1 else "none")
    got = staged(run, params, pipeline.Schedule(repeats=repeats), stage=stages, data=2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(params, *rows())), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("parts", [pytest.param(4, marks=slow), 8, pytest.param(16, marks=slow)])
def test_the_number_of_microbatches_changes_nothing(parts):
    run, params = toy(4, plain)
    got = staged(run, params, pipeline.Schedule(microbatches=parts), stage=4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(params, *rows())), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_microbatch_has_masks_of_its_own_forward_and_back():
    keys = jax.random.split(jax.random.key(0), 2)
    only = lambda block, x_BD, read_B, key: dropout(x_BD, 0.5, key) + 0 * block.scale_D[...].sum()  # noqa: E731
    run, params = toy(2, only, "full", keys)
    (_, out), (_, d_x) = staged(run, params, pipeline.Schedule(microbatches=4), stage=2)
    seen = np.asarray(out) != 0
    parts = {half[first::2].tobytes() for half in np.split(seen, 2) for first in range(2)}
    assert len(parts) == 4 and 0.1 < seen.mean() < 0.4
    np.testing.assert_array_equal(np.asarray(d_x)[1:] != 0, seen[1:], "the backward pass draws the same")


def test_what_does_not_fit_is_refused_with_what_would():
    mesh = axes.mesh(data=2, stage=4)
    blueprint = families.blueprint("llama", layers=8)
    with pytest.raises(Mistake, match=r"config.mesh.stage=4 does not divide the 6 layers of .*; what does: 1, 2, 3, 6"):
        axes.shardings(families.blueprint("llama", layers=6).shapes, mesh)

    def check(rows, **schedule):
        with axes.on(mesh), pipeline.on(pipeline.Schedule(**schedule)):
            pipeline.check(blueprint.shapes, rows)

    for rows, schedule in [(16, {}), (8, dict(repeats=2)), (8, dict(microbatches=4)), (32, dict(microbatches=16))]:
        check(rows, **schedule)
    with pytest.raises(Mistake, match=r"6 rows at a time .config.batch. do not divide over config.mesh.stage=4"):
        check(6)
    with pytest.raises(Mistake, match=r"microbatches=6: 16 rows on stage x data go into 4, 8$"):
        check(16, microbatches=6)
    with pytest.raises(Mistake, match=r"repeats=3 x config.mesh.stage=4 .* 8 layers of blocks; repeats that do: 1, 2"):
        check(16, repeats=3)
    with pytest.raises(Mistake, match=r"config.pipeline.repeats=0"):
        pipeline.Schedule(repeats=0)
    run, params = toy(4, lambda *xs: plain(*xs[:4]), kinds=[1, 2, 1, 3])
    with pytest.raises(Mistake, match=r"each has 2 of 4 layers, which must be of the same kinds"):
        staged(run, params, stage=2)
    run, params = toy(4, plain)
    with pytest.raises(Mistake, match=r"repeats=2 needs config.model.remat: full or dots, not none"):
        staged(run, params, pipeline.Schedule(repeats=2), stage=2)


def test_a_stage_has_its_part_of_all_parameters():
    params = families.blueprint("llama", layers=4).shapes
    places = axes.shardings(params, axes.mesh(data=1, stage=4))
    for x, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert np.prod(place.shard_shape(x.shape)) == x.size / 4
    assert places["blocks"]["attn"]["wq_DNH"].spec[0] == "stage"


# Models


def batch():
    """Rows of several documents, and padding, no two rows alike."""
    tokens = np.random.default_rng(0).integers(0, families.V, (B, T))
    first, second = np.random.default_rng(1).integers(2, T, (2, B, 1))
    segments = 1 + (np.arange(T) >= first) + (np.arange(T) >= second)
    segments[::4, -3:] = 0
    weights = (segments > 0).astype(np.float32)
    return dict(tokens=tokens, segments=segments, labels=tokens * 7 % families.V, weights=weights)


@functools.cache
def model(name, remat="none"):
    return families.blueprint(
        name, remat=remat, layers=4, **(dict(router_z=0.5, balance=0.5) if name == "mixtral" else {})
    )


def both(model: Blueprint):
    """Loss and gradients, as a function of parameters and a batch."""
    return jax.jit(
        jax.value_and_grad(lambda p, batch: families.objective(model.bind(p), batch) / batch["weights"].sum())
    )


@functools.cache
def alone(name):
    params = noisy(model(name), std=0.2)
    return params, both(model(name))(params, {k: jnp.asarray(x) for k, x in batch().items()})


WAYS = {
    "stage": (dict(data=1, stage=4), pipeline.USUAL, "none"),
    "stage and data": (dict(data=2, stage=4), pipeline.Schedule(microbatches=8), "full"),
    "stage, fsdp and tensor": (dict(stage=2, fsdp=2, tensor=2), pipeline.USUAL, "none"),
    "stage, sequence and tensor": (dict(stage=2, sequence=2, tensor=2), pipeline.USUAL, "none"),
    "twice around": (dict(stage=2, fsdp=2, data=2), pipeline.Schedule(repeats=2), "dots"),
}
FAST = [("llama", "stage and data")]
SLOW = [(n, w) for w in WAYS for n in ("gpt2", "llama", "bert", "mixtral", "t5") if (n, w) not in FAST]


@pytest.mark.parametrize("name, way", FAST + [pytest.param(*one, marks=slow) for one in SLOW])
def test_loss_and_gradients_are_those_of_one_device(name, way):
    params, (want, want_grads) = alone(name)
    sizes, schedule, remat = WAYS[way]
    mesh = axes.mesh(**sizes)
    with axes.on(mesh), pipeline.on(schedule):
        placed = jax.device_put(params, axes.shardings(params, mesh))
        got, grads = both(model(name, remat))(placed, axes.put(batch(), B, mesh))
    assert got == pytest.approx(float(want), abs=1e-5)
    close(grads, want_grads)


def test_whatever_stages_send_goes_to_a_neighbour_and_no_layer_is_gathered():
    run, params = toy(4, plain)
    mesh = axes.mesh(data=1, stage=4)
    with axes.on(mesh):
        place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)  # noqa: E731
        placed = jax.tree.map(place, params, axes.shardings(params, mesh))
        text = run.lower(placed, *axes.put(dict(zip("xr", rows())), B, mesh).values()).compile().as_text() or ""
    assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text
    for pairs in re.findall(r"source_target_pairs=\{\{(.*?)\}\}", text):
        assert {(int(b) - int(a)) % 4 for a, b in re.findall(r"(\d),(\d)", pairs)} in ({1}, {3}), pairs


def test_layers_on_stages_keep_what_they_are_given():
    step, params = toy(4, plain, remat="offload")
    mesh, refused = axes.mesh(data=1, stage=2, devices=jax.devices()[:2]), r"config.model.remat=offload: .* choose full"
    with axes.on(mesh), pytest.raises(Mistake, match=refused):
        step(params, *rows())


def test_what_layers_are_given_may_go_to_the_hosts_and_changes_no_gradient():
    (run, params), (offloaded, _) = toy(4, plain), toy(4, plain, remat="offload")
    close(offloaded(params, *rows()), run(params, *rows()))
    assert "<host>" in str(offloaded.trace(params, *rows()).jaxpr)
