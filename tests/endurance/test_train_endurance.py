"""What a run survives: kill -9 at any moment, and a disk that fills up."""

import json
import os
from pathlib import Path
import random
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from jaxlm import train
from tests.runs import STEPS, arrays, command, environment, losses, run, settings, start, write_store

pytestmark = pytest.mark.endurance
KILLS = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir, store)
    return workdir


def progress(workdir: Path) -> int:
    """How much a run has written: lines of metrics and files of checkpoints, half-written ones included."""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return lines + sum(len(files) for _, _, files in os.walk(workdir / "checkpoints"))  # folders may vanish meanwhile


def test_killed_at_twenty_random_moments_it_ends_in_the_same_bits(store, whole, tmp_path):
    """Each kill falls a random while after the run has begun to train or to save; the save after every step is
    included.
    """
    rng, kills, finished = random.Random(0), 0, 0
    while kills < KILLS:
        process = start(tmp_path, store, "--config.every.save=1")
        began = progress(tmp_path)
        while process.poll() is None and progress(tmp_path) <= began:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        output = process.finished()
        assert process.returncode in (0, -signal.SIGKILL), output
        if process.returncode == 0:  # it came to the end before it was killed: start again, and kill it earlier
            finished += 1
            compare(whole, tmp_path)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        assert finished < 3 * KILLS
    run(tmp_path, store, "--config.every.save=1")
    compare(whole, tmp_path)


def compare(one: Path, two: Path) -> None:
    for a, b in zip(arrays(one), arrays(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(one) == losses(two) and len(losses(two)) == STEPS


def test_it_resumes_on_stages_with_the_same_losses(store, tmp_path):
    """Without dropout, of which each microbatch of a pipeline has masks of its own."""
    keys = settings(model=settings()["model"] | dict(dropout=0.0))
    train.train(str(tmp_path / "whole"), store=store, **keys)
    train.train(str(tmp_path / "run"), store=store, **keys | dict(steps=5))
    train.train(str(tmp_path / "run"), store=store, **keys | dict(mesh=dict(data=2, stage=2, fsdp=2)))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), atol=1e-5)


def test_a_full_disk_stops_the_run_and_loses_nothing(store, whole, tmp_path):
    """On a small tmpfs: the run stops with a clear line; with more room the same command goes on to the same losses."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    train = shlex.join(command(tmp_path, store, "--config.every.save=1", "--config.checkpoint.newest=100"))
    train = train.replace(f"--workdir={tmp_path}", f"--workdir={disk}")
    script = f"""
        mount -t tmpfs -o size=3m tmpfs {disk} || exit 77
        {train} > {keep}/first.log 2>&1; echo $? > {keep}/first.rc
        ls {disk}/checkpoints > {keep}/saved
        mount -o remount,size=500m {disk}
        {train} > {keep}/second.log 2>&1; echo $? > {keep}/second.rc
        cp -r {disk}/metrics.jsonl {disk}/checkpoints {keep}/
    """
    unshared = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    if subprocess.run([*unshared[:3], "true"], capture_output=True).returncode:
        unshared = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(unshared, env=environment(), capture_output=True, text=True)
    if done.returncode == 77 or "Operation not permitted" in done.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
    first, second = (keep / "first.log").read_text(), (keep / "second.log").read_text()
    assert (keep / "first.rc").read_text().strip() == "2" and "the disk is full" in first, first
    assert "Traceback" not in first
    saved = [name for name in (keep / "saved").read_text().split() if name.isdigit()]
    assert saved, "some checkpoints were finished before"
    assert (keep / "second.rc").read_text().strip() == "0" and "going on after step" in second, second
    assert losses(keep) == losses(whole)


def test_too_many_skipped_steps_end_the_run_and_keep_what_was_saved(store, tmp_path):
    """A learning rate that explodes: every step after some is refused, and the run says what to try."""
    flags = ["--config.optimizer.lr=1e30", "--config.optimizer.clip=0.0", "--config.optimizer.name=sgd"]
    output = run(tmp_path, store, *flags, "--config.guard.patience=3", check=2)
    assert "3 steps in a row were skipped" in output and "Traceback" not in output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("skipped", 0) for line in lines) >= 2
