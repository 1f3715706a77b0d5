"""A whole life in a bucket, gs:// or s3://: prepared, trained, killed, resumed, measured, used; as in a folder."""

import json
from pathlib import Path
import signal
import sys
import time

import pytest

from tests import runs
from tests.buckets import Buckets, serve

pytestmark = pytest.mark.endurance

CONFIG = """
from ml_collections import ConfigDict

def get_config(size="full"):
    from tests.runs import settings
    c = ConfigDict(settings(every=dict(log=1, eval=6, save=2)))
    c.prepare = dict(sources={sources!r}, tokenizer=dict(kind="bytes"), validation=0.2, dedup=dict(near=0.0))
    c.samples = dict(prompts=["."], tokens=4)
    return c
"""


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """An empty bucket's address, and its server."""
    pytest.importorskip(dict(gs="gcsfs", s3="s3fs")[request.param])
    with serve() as server:
        yield f"{request.param}://bucket", server


def start(server: Buckets, program: str, *flags: str) -> runs.Started:
    environment = runs.environment(**server.environment, JAX_PLATFORMS="cpu")
    return runs.Started([sys.executable, "-m", "jaxlm", program, *flags], environment)


def call(server: Buckets, program: str, *flags: str) -> str:
    process = start(server, program, *flags)
    output = process.finished()
    assert process.returncode == 0, output
    return output


def losses(text: str) -> dict[tuple, float]:
    """The losses of a run's metrics.jsonl, by step and evaluation."""
    lines = [json.loads(line) for line in text.splitlines()]
    found = {(line["step"], line.get("eval")): line["loss"] for line in lines}
    assert len(found) == len(lines), "each is logged once"
    return found


def test_a_run_in_a_bucket_that_is_killed_and_resumed_is_the_run_in_a_folder(bucket, tmp_path):
    root, server = bucket
    sources = runs.write_corpus(tmp_path)
    for name in sources:
        server.put(f"bucket/text/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    flags = {}
    for where, text, place in (("here", tmp_path, str(tmp_path)), ("there", f"{root}/text", root)):
        config = tmp_path / f"{where}.py"
        config.write_text(CONFIG.format(sources={name: f"jsonl:{text}/{name}.jsonl" for name in sources}))
        flags[where] = (f"--config={config}", f"--config.store={place}/store/")
    call(server, "prepare", *flags["here"])
    call(server, "train", *flags["here"], f"--workdir={tmp_path}/run")

    call(server, "prepare", *flags["there"])
    assert "already prepared" in call(server, "prepare", *flags["there"])
    process = start(server, "train", *flags["there"], f"--workdir={root}/run")
    deadline = time.monotonic() + 200
    while not any("checkpoints/4/seal" in key for key in list(server.objects)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.finished()
    assert "going on after step" in call(server, "train", *flags["there"], f"--workdir={root}/run")

    held = {key.removeprefix("bucket/run/"): value for key, value in server.objects.items() if "/run/" in key}
    assert {"config.json", "command", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"} < held.keys()
    assert any(name.startswith("events/") for name in held) and any(name.startswith("tokenizer/") for name in held)
    assert "12" in {name.split("/")[1] for name in held if name.startswith("checkpoints/")}
    assert losses((tmp_path / "run/metrics.jsonl").read_text()) == losses(held["metrics.jsonl"].decode())
    assert not [path for path in Path.cwd().iterdir() if path.name in ("gs:", "s3:")], "an address became a folder"

    call(server, "evaluate", f"--workdir={root}/run", f"--json={root}/figures.json", f"--data=store:{root}/store")
    assert json.loads(server.objects["bucket/figures.json"])["results"]["all"]["loss"] > 0
    server.put("bucket/prompts.txt", b".\n.a\n")
    how = ("--max_new_tokens=4", f"--prompts={root}/prompts.txt", f"--output={root}/answers.jsonl")
    call(server, "generate", f"--workdir={root}/run", *how)
    assert len(server.objects["bucket/answers.jsonl"].splitlines()) == 2
