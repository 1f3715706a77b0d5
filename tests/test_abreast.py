"""A CPU's cores as devices, each with rows of its own (`jaxlm.step.abreast`)."""

import os
import sys
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import program, step, train
from jaxlm.lookup import Mistake, spend
from tests.runs import Started, arrays, losses, settings, write_store

MODEL = dict(name="llama", layers=1, width=8, heads=2, kv_heads=2, head_width=4, mlp_width=16)


@pytest.mark.parametrize(
    "change, devices",
    [
        ({}, 4),
        (dict(batch=6), 3),
        (dict(batch=7), 1),
        (dict(accumulate=4), 2),
        (dict(mesh=dict(data=-1)), 1),
        (dict(model=MODEL | {"dropout": 0.1}), 1),
        (dict(model=dict(name="mixtral", layers=1, width=8)), 1),
        (dict(vocab=2**24), 1),
        (dict(optimizer=dict(name="muon")), 1),
        (dict(optimizer=dict(name="adafactor")), 4),
        (dict(length=63), 1),
        (dict(rules=dict(B="fsdp")), 1),
        (dict(model=dict(name="bert"), objective=dict(name="electra")), 1),
        (dict(model=dict(name="bert", layers=2, width=32, heads=4), objective=dict(name="mlm", rate=0.2)), 4),
        (dict(model=dict(name="bert", layers=2, width=32, heads=4), objective=dict(name="mlm", next="nsp")), 1),
    ],
    ids=str,
)
def test_a_cpu_is_as_many_devices_as_its_rows_allow(monkeypatch, change, devices):
    monkeypatch.setattr("jaxlm.program.cores", lambda: 16)
    assert step.abreast(**dict(model=MODEL, vocab=300, batch=8, length=128) | change) == devices


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch=0), "config.batch=0"),
        (dict(batch="8"), "config.batch"),
        (dict(accumulate=3), "config.batch=8 is no multiple of config.accumulate=3"),
        (dict(model=dict(name="lama")), "did you mean 'llama'"),
        (dict(objective=dict(name="clmm")), "did you mean 'clm'"),
        (dict(objective=dict(rate=0.3)), "config.objective needs a name"),
    ],
    ids=str,
)
def test_what_is_no_config_is_answered_as_training_would(change, message):
    with pytest.raises(Mistake, match=message):
        spend("config", step.abreast, dict(model=MODEL, vocab=300, batch=8, length=128) | change)


@pytest.mark.parametrize(
    "told", [dict(JAX_NUM_CPU_DEVICES="1"), dict(XLA_FLAGS="--xla_force_host_platform_device_count=4")]
)
def test_who_says_how_many_devices_there_are_is_heeded(monkeypatch, told):
    """Else a mesh simulated by JAX's own flag would be of other devices than were asked for."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    keys, before = dict(model=MODEL, batch=8, length=128, store="nowhere"), jax.config.jax_num_cpu_devices
    with pytest.raises(Mistake, match="nowhere"):  # untold, it looks at the store
        train._take_cores(keys)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    train._take_cores(keys)
    assert jax.config.jax_num_cpu_devices == before


def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    share = tmp_path / "cpu.max"
    monkeypatch.setattr(program, "Path", lambda _: share)
    for text, cores in (("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 64), ("", 64)):
        share.write_text(text)
        assert program.cores() == cores


def test_the_command_takes_cores_for_devices_and_learns_the_same(tmp_path, monkeypatch):
    """In two parts, bit for bit as at once, and near to what one device learns."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    store = write_store(tmp_path)
    how: dict[str, Any] = dict(steps=4, length=64, samples=dict(prompts=["."], tokens=4))
    how["model"] = settings()["model"] | {"dropout": 0.0}
    train.train(str(tmp_path / "one"), store=store, **settings(**how))
    file = tmp_path / "config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\nfrom tests.runs import settings\n"
        f"def get_config():\n    return ConfigDict(settings(store={store!r}, mesh={{}}, **{how}))\n"
    )

    def run(name: str, *flags: str) -> str:
        command = [sys.executable, "-m", "jaxlm.train", f"--config={file}", f"--workdir={tmp_path / name}", *flags]
        return Started(command, dict(os.environ)).finished()

    assert f"'data': {[1, 1, 2, 2, 4][min(4, program.cores())]}" in run("whole"), "what divides the 4 rows of a part"
    run("parts", "--config.steps=2")
    assert "going on after step 2 of 4" in run("parts")
    for one, two in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "one"), rtol=1e-5)
