"""Hosts that die: the others end and say so, and another number of them goes on with the same losses."""

import json
from pathlib import Path
import time

import numpy as np
import pytest

from jaxlm.hosts import BOUND, CODE
from tests.runs import STEPS, losses, run, start_processes, write_store

pytestmark = pytest.mark.endurance


def newest(workdir: Path) -> int:
    """The last step that was saved."""
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.exists() else 0


def kill_one(processes: list, victim: int, workdir: Path) -> list[str]:
    """Kill -9 one of the processes once they have saved a step; what the others then print, who end within BOUND."""
    begun = newest(workdir)
    while newest(workdir) == begun:
        time.sleep(0.05)
        assert all(process.poll() is None for process in processes), [p.output() for p in processes]
    processes[victim].kill()
    others = [process for process in processes if process is not processes[victim]]
    outputs = [process.finished(BOUND) for process in others]
    processes[victim].finished()
    assert [process.returncode for process in others] == [CODE] * len(others), "\n".join(outputs)
    return outputs


def test_four_processes_then_two_then_one_train_to_the_same_losses_though_each_time_one_is_killed(tmp_path):
    store = write_store(tmp_path)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()
    workdir.mkdir()
    run(whole, store)
    for output in kill_one(start_processes(4, workdir, store), 2, workdir):
        assert "process 2 of 4 on " in output and " died: no sign of life for " in output
        assert "is saved in " in output and "goes on from there" in output
    for output in kill_one(start_processes(2, workdir, store), 0, workdir):
        assert "process 0 of 2, where they meet, died or cannot be reached" in output
    assert "going on after step" in run(workdir, store)
    np.testing.assert_allclose(losses(workdir), losses(whole), atol=1e-5)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    told = [line["slowest_host"] for line in lines if "slowest_host" in line]
    assert len(told) >= 3 and set(told) <= {0, 1, 2, 3} and len(losses(workdir)) == STEPS
