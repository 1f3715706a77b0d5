"""Checkpoints: the newest and the best are kept, damage of any kind is found out, a full disk loses nothing."""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.arrays import subchunking
import pytest

from jaxlm import axes, checkpoint, chunks
from jaxlm.checkpoint import Checkpoints
from jaxlm.lookup import Mistake


def state(value: float = 0.0):
    """A state with an array that tells steps apart."""
    noise = jax.random.normal(jax.random.key(0), (64, 8))
    return {
        "params": {"up_DF": noise + value, "scale_D": jnp.ones(8)},
        "opt": {"mu": noise * 2, "count": jnp.int32(value)},
    }


SHAPES = jax.eval_shape(state)


def shapes():
    one = axes.mesh(devices=jax.devices()[:1])
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), SHAPES, axes.shardings(SHAPES, one)
    )


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3."""
    with Checkpoints(str(tmp_path), newest=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"loss": 1.0})
    return tmp_path


def files(folder: Path):
    """What holds the data, the largest last; the marker of a finished write holds none."""
    data = (f for f in folder.rglob("*") if f.is_file() and f.name != "commit_success.txt")
    return sorted(data, key=lambda f: f.stat().st_size)


def change_a_byte(folder):
    largest = files(folder)[-1]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def remove_a_file(folder):
    files(folder)[-1].unlink()


def cut_a_file_short(folder):
    os.truncate(files(folder)[-1], files(folder)[-1].stat().st_size // 2)


def swap_in_another_steps_file(folder):
    """Damage that every file format would accept: the arrays of step 1 under the seal of step 3."""
    older = folder.parents[1] / "1" / folder.name
    for file in older.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(older)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


@pytest.mark.parametrize("damage", [change_a_byte, remove_a_file, cut_a_file_short, swap_in_another_steps_file])
@pytest.mark.parametrize("part", ["params", "opt", "seal"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(saved, part, damage, caplog):
    damage(saved / "checkpoints" / "3" / part)
    with Checkpoints(str(saved), newest=3) as checkpoints:
        step, found = checkpoints.restore(shapes())
    assert step == 2 and "checkpoint of step 3 is damaged" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, found, state(2))


def test_a_save_that_was_cut_off_is_no_checkpoint(saved):
    newest = saved / "checkpoints" / "3"
    newest.rename(newest.with_name("4.orbax-checkpoint-tmp-1"))
    with Checkpoints(str(saved), newest=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(str(tmp_path), newest=2, best=1) as checkpoints:
        for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 2.6), start=1):
            checkpoints.save(step, state(step), {"loss": loss})
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == 2
    for step, want in (("best", 2), ("newest", 5), (4, 4), ("4", 4)):
        number, params = checkpoint.restore_params(str(tmp_path), SHAPES["params"], step=step)
        assert number == want
        np.testing.assert_array_equal(params["up_DF"], state(want)["params"]["up_DF"])
    with pytest.raises(Mistake, match="no checkpoint 3; choices: newest, best, 2, 4, 5"):
        checkpoint.restore_params(str(tmp_path), SHAPES["params"], step=3)


def test_a_state_of_another_shape_is_never_half_restored(saved):
    other = shapes()
    other["params"]["up_DF"] = jax.ShapeDtypeStruct((64, 9), jnp.float32, sharding=other["params"]["up_DF"].sharding)
    with Checkpoints(str(saved), newest=3) as checkpoints, pytest.raises(Mistake, match="no checkpoint can be used"):
        checkpoints.restore(other)


def test_a_checkpoint_of_one_device_is_read_on_eight(saved):
    mesh = axes.mesh(data=2, fsdp=2, tensor=2)
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), SHAPES, axes.shardings(SHAPES, mesh)
    )
    with Checkpoints(str(saved), newest=3) as checkpoints:
        _, found = checkpoints.restore(placed)
    assert found["params"]["up_DF"].sharding == placed["params"]["up_DF"].sharding
    jax.tree.map(np.testing.assert_array_equal, found, state(3))


@pytest.fixture
def small_chunks(monkeypatch):
    """The arrays of these tests are large ones, of many chunks."""
    monkeypatch.setattr(chunks, "CHUNK", 64)
    monkeypatch.setattr(chunks, "AHEAD", 128)


@pytest.mark.parametrize("before, after", [((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 8, 1)), ((1, 8, 1), (1, 1, 1))])
def test_an_array_of_many_chunks_goes_from_any_mesh_to_any(tmp_path, small_chunks, before, after):
    def placed(sizes):
        mesh = axes.mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)), devices=jax.devices()[: math.prod(sizes)])
        return mesh, axes.shardings(SHAPES, mesh)

    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, jax.device_put(state(1), placed(before)[1]))
    assert len(files(tmp_path / "checkpoints" / "1" / "params" / "up_DF")) > 30
    mesh, places = placed(after)
    asked = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), SHAPES, places)
    with axes.on(mesh), Checkpoints(str(tmp_path)) as checkpoints:
        _, found = checkpoints.restore(asked)
    assert jax.tree.map(lambda x: x.sharding, found) == places
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


@pytest.mark.parametrize("damage", [change_a_byte, remove_a_file, cut_a_file_short])
def test_damage_to_one_of_many_chunks_is_found_out(tmp_path, small_chunks, damage):
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2))
    damage(tmp_path / "checkpoints" / "2" / "params" / "up_DF")
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.restore(shapes())[0] == 1


@pytest.mark.parametrize("large", [False, True])
def test_checkpoints_of_the_form_before_are_read(tmp_path, large, request):
    if large:
        request.getfixturevalue("small_chunks")
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        parts = {name: ocp.args.StandardSave(tree) for name, tree in state(3).items()}
        manager.save(3, args=ocp.args.Composite(**parts, seal=ocp.args.JsonSave(checkpoint.seal(state(3)))))
    assert (tmp_path / "checkpoints" / "3" / "params" / "manifest.ocdbt").exists()
    with Checkpoints(str(tmp_path)) as checkpoints:
        step, found = checkpoints.restore(shapes())
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, found, state(3))
        checkpoints.save(4, state(4))
        checkpoints.wait()
        assert checkpoints.restore(shapes())[0] == 4


@pytest.mark.parametrize(
    "shape, most",
    [((48, 1600), 1), ((48, 1600, 6400), 200), ((50257, 1600), 40), ((30522, 1024), 20), ((32003, 4096), 1)],
)
def test_an_array_is_cut_into_chunks_that_are_neither_many_nor_tiny(shape, most):
    at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
    how = chunks.cut(x)
    chunk = subchunking.choose_chunk_shape(shape, shape, x.dtype, how.chunk_byte_size, shard_axes=how.shard_axes)
    assert math.prod(shape) // math.prod(chunk) <= most


def test_a_seal_is_the_same_on_every_mesh_and_sees_every_bit():
    tree = state(3.0)
    mesh = axes.mesh(data=2, fsdp=2, tensor=2)
    sealed = checkpoint.seal(tree)
    assert checkpoint.seal(jax.device_put(tree, axes.shardings(tree, mesh))) == sealed
    x = tree["params"]["up_DF"]
    for other in (
        x.at[5, 5].set(jnp.nextafter(x[5, 5], jnp.float32(9.0))),
        x[::-1],
        x[:, ::-1],
        x.at[0].set(x[1]).at[1].set(x[0]),
        -x,
    ):
        assert checkpoint.seal({"params": {"up_DF": other}})["['params']['up_DF']"] != sealed["['params']['up_DF']"]


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(Mistake, match="has no finished checkpoint"):
        checkpoint.restore_params(str(tmp_path), SHAPES["params"])
