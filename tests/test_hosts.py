"""Several hosts: who died is told from signs of life, and which host the others wait for from the metrics."""

import time

from jax.experimental import multihost_utils
import numpy as np
import pytest

from jaxlm import log
from jaxlm.hosts import GRACE, SILENCE, Together


@pytest.fixture
def clock(monkeypatch):
    """A time that stands still until a test moves it: `clock[0] += 1`."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def judge(tmp_path):
    """What process 0 of three says of a round of signs."""
    together, seen = Together(str(tmp_path)), {}
    together._many = 3
    return lambda *signs: together._judge(dict(enumerate(signs)), seen)


def alive(tick):
    return f"alive host {tick}"


def test_a_process_that_gives_no_sign_for_the_bound_is_dead_and_not_before(judge, clock):
    for tick in range(int(SILENCE) + 1):
        clock[0] = tick
        assert not judge(alive(tick), "alive worker-7 0", alive(tick))
    clock[0] += 1
    said = judge(alive(-1), "alive worker-7 0", alive(-1))
    assert said == "process 1 of 3 on worker-7 died: no sign of life for 46 s"


def test_after_a_failure_a_short_silence_tells_the_dead_from_those_that_failed_by_it(judge, clock):
    for tick in range(int(GRACE) + 1):
        clock[0] = tick
        assert not judge("failed host ValueError: closed", "failed host ValueError: closed", "alive worker-2 0")
    clock[0] += 1
    assert "process 2 of 3 on worker-2 died" in judge("failed host a: b", "failed host a: b", "alive worker-2 0")


def test_where_all_live_the_first_that_failed_is_named_with_its_reason(judge, clock):
    for tick in range(2 * int(GRACE) + 1):
        clock[0] = tick
        assert not judge(alive(tick), "failed worker-1 ValueError: a bad row", alive(tick))
    clock[0] += 1
    said = judge("failed host E: later", "failed worker-1 ValueError: a bad row", alive(-1))
    assert said == "process 1 of 3 on worker-1 failed: ValueError: a bad row"


def test_a_process_that_is_done_is_never_missed(judge, clock):
    for tick in range(0, 1000, 10):
        clock[0] = tick
        assert not judge(alive(tick), "done", alive(tick))


def test_the_host_that_the_others_wait_for_is_named_with_what_it_costs_a_step(monkeypatch):
    each = np.array([[0.1, 0.01, 0.02], [3.0, 0.3, 0.52], [0.2, 0.02, 0.03]], np.float32)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: each)
    found = log._hosts(0.1, 10.0, 0.02)
    assert found == pytest.approx(dict(wait_s=3.0, wait_share=0.3, slowest_host=1, behind_s=0.49))


def test_one_host_is_not_compared_with_others():
    assert log._hosts(1.0, 4.0, 0.5) == pytest.approx(dict(wait_s=1.0, wait_share=0.25))
