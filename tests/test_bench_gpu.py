"""The GPU's measurements run through at toy sizes on a CPU, beside a peer; and say what is missing."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
PEER = """
import json, sys
flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[2:])
assert sys.argv[1] == "speed" and flags["dtype"] == "bfloat16", sys.argv
if int(flags["batch"]) > 1:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
for mode, rate in zip(flags["mode"].split(","), (1, 2)):
    print(json.dumps(dict(mode=mode, tokens_per_s=rate, gflops=rate / 10)))
"""


def bench(*flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "JAX_NUM_CPU_DEVICES": "1"}
    line = [sys.executable, str(SCRIPTS / "bench_gpu.py"), *flags]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_measures_nothing():
    done = bench("train")
    assert done.returncode == 2 and not done.stdout
    assert "no GPU here: jax sees only cpu" in done.stderr and "--tiny" in done.stderr


def test_a_part_that_is_not_is_answered_with_those_that_are():
    assert "'trian' is none of train, attention, decode" in bench("trian").stderr
    assert "'bert' is none of gpt2, llama" in bench("--model=bert").stderr


@pytest.mark.endurance
def test_all_of_it_runs_beside_a_peer_whose_batch_is_halved_until_it_fits(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    flags = "--model=llama", "--repeats=1", "--prompt=4", "--new=2", f"--peer={sys.executable} {tmp_path}/peer.py"
    done = bench("--tiny", *flags)
    assert done.returncode == 0, done.stderr
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert first == {"device": "cpu", "tiny": True} and not any("failed" in line for line in lines), lines
    (mine,) = (line for line in lines if "remat" in line)
    peers = [line for line in lines if "mode" in line]
    assert [(p["mode"], p["batch"]) for p in peers] == [("eager", 1), ("compile", 1)] * 2
    (ratio,) = (line for line in lines if line["what"] == "ratio")
    assert ratio["tokens_per_s"] == round(mine["tokens_per_s"] / 2, 3)
    attentions = {line["backend"]: line for line in lines if line["what"] == "attention"}
    assert attentions["cudnn"]["refused"] and all(attentions[b]["ms"] > 0 for b in ("xla", "chunked", "triton"))
    assert [line["batch"] for line in lines if line["what"] == "decode" and line["new_tokens_per_s"] > 0] == [1, 4]
