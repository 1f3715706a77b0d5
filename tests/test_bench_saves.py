"""What saving and restoring take of memory is measured, and is little more than what is saved."""

import argparse

import pytest

from jaxlm import program
from scripts import bench_saves


@pytest.mark.endurance
def test_saving_and_restoring_hold_the_parameters_and_little_more(monkeypatch):
    """GPT-2 XL's width and a sixth of its layers. On a CPU the parameters themselves are in the host's memory: 1.0."""
    monkeypatch.delenv("XLA_FLAGS")  # as users run it: fused
    monkeypatch.setenv("GLIBC_TUNABLES", program.HUGE_PAGES)
    found = bench_saves.memory(argparse.Namespace(layers=8, width=1600, context=1024, vocab=50257), "params")
    assert found["size_gb"] > 1.3 and 1 < found["save"] <= 1.3 and 1 < found["restore"] <= 1.3, found
    assert found["files"] < 300, found
