"""The order of the data survives everything: a run is given the same batches, byte for byte, however it came about.

With packing, a mixture whose weights change and whose sources run out, and the noise of masked language modelling.
"""

import signal

import numpy as np
import pytest

from tests.recording import same
from tests.runs import STEPS, arrays, losses, run, two_processes, write_store

DATA = dict(schedule=[(0, dict(prose=2.0, lists=1.0)), (6, dict(prose=1.0, lists=3.0))], epochs=dict(lists=1.5))
MODEL = dict(name="bert", layers=2, width=32, heads=4, mlp_width=64, dropout=0.1)
MASK = 259  # behind 256 bytes and 3 specials
OBJECTIVE = dict(name="mlm", unit="span")
FLAGS = [
    "--config.length=160", f"--config.model={MODEL}", f"--config.objective={OBJECTIVE}", f"--config.data={DATA}",
]  # fmt: skip
pytestmark = pytest.mark.endurance  # four runs of the whole program


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("corpus"), extra=["<mask>"])


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir, store, *FLAGS, module="tests.recording")
    return workdir


def batches(workdir):
    """The global batch of each step, in order, put together from what each process was given."""
    parts = [sorted(workdir.glob(f"batches/{step:03}-*.npz"), key=lambda p: int(p.stem[4:])) for step in range(1, 13)]
    steps = [[dict(np.load(path)) for path in paths] for paths in parts]
    return [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]


def test_twelve_steps_are_five_a_kill_and_seven(store, whole, tmp_path):
    run(tmp_path, store, *FLAGS, module="tests.recording", check=-signal.SIGKILL, KILL_BEFORE="6")
    assert len(list(tmp_path.glob("batches/*.npz"))) == 5
    run(tmp_path, store, *FLAGS, module="tests.recording")
    assert all(same(one, two) for one, two in zip(batches(whole), batches(tmp_path), strict=True))
    assert losses(whole) == losses(tmp_path)
    for one, two in zip(arrays(whole), arrays(tmp_path), strict=True):
        np.testing.assert_array_equal(one, two)


def test_twelve_steps_are_four_on_one_process_and_eight_on_two(store, whole, tmp_path):
    run(tmp_path, store, *FLAGS, "--config.steps=4", module="tests.recording")
    two_processes(tmp_path, store, *FLAGS, module="tests.recording")
    assert len(list(tmp_path.glob("batches/*.npz"))) == 4 + 2 * 8
    assert all(same(one, two) for one, two in zip(batches(whole), batches(tmp_path), strict=True))
    np.testing.assert_allclose(losses(tmp_path), losses(whole), atol=1e-5)


def test_the_batches_are_packed_mixed_and_noisy(whole):
    """Else the tests above would show little."""
    steps = batches(whole)
    assert len(steps) == STEPS and not same(steps[0], steps[1])
    segments = np.concatenate([step["segments"] for step in steps])
    assert (segments.max(axis=1) > 1).mean() > 0.5
    chosen, masked = (
        np.concatenate([found(step) for step in steps])
        for found in (lambda step: step["weights"] > 0, lambda step: step["tokens"] == MASK)
    )
    assert 0.1 < chosen[segments > 0].mean() < 0.16, "each row's noise is its own"
    assert 0.7 < masked[chosen].mean() < 0.9 and not masked[~chosen].any()
    assert len(np.unique(chosen, axis=0)) == len(chosen)
