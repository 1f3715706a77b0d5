"""Small training runs that the tests share: a corpus, a config, programs started and read."""

from collections.abc import Sequence
import functools
import json
import os
from pathlib import Path
import random
import socket
import subprocess
import sys
import tempfile
from typing import Any, ClassVar

import numpy as np
import tensorstore as ts

from jaxlm import prepare

STEPS = 12


def settings(*, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """The keys of a run with packing, a mixture, dropout, accumulation and a moving average; `total` fixes the
    schedule.
    """
    model = dict(name="llama", layers=2, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=64, dropout=0.1)
    optimizer = dict(name="adamw", lr=1e-2, schedule="constant", warmup=2, weight_decay=0.1, clip=1.0)
    keys = dict(
        model=model, optimizer=optimizer, steps=steps, batch=8, length=32, accumulate=2, ema=0.9,
        mesh=dict(data=1, fsdp=1, tensor=1),
        data=dict(weights=dict(prose=2.0, lists=1.0)), every=dict(log=1, eval=6, save=2), evaluation=dict(documents=8),
    )  # fmt: skip
    return keys | changes


CONFIG = """
from ml_collections import ConfigDict

def get_config(size="full"):
    from tests.runs import settings
    return ConfigDict(settings())
"""


def write_corpus(folder: Path) -> dict[str, str]:
    """Two files of generated documents, the same every time; returns the sources."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(50)]

    def document() -> str:
        return " ".join(rng.choices(words, k=int(rng.lognormvariate(2.5, 1))))

    for name, count in (("prose", 200), ("lists", 60)):
        lines = [json.dumps({"text": f".{document()}."}) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: f"jsonl:{folder}/{name}.jsonl" for name in ("prose", "lists")}


def write_store(folder: Path, extra: Sequence[str] = ()) -> str:
    """A store of both files as bytes and `extra` specials, held-out documents included; returns its path."""
    tokenizer = dict(kind="bytes", extra=list(extra))
    prepare.prepare(str(folder / "store"), write_corpus(folder), tokenizer, validation=0.2, workers=1)
    return str(folder / "store")


def losses(workdir: Path) -> list[float]:
    """Every logged training loss, in the order of the steps."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "eval" not in line}
    assert list(found) == list(range(1, len(found) + 1)), "each step is logged once, in order"
    return list(found.values())


def arrays(workdir: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint, optimizer included, read from the files as they lie."""
    folder = Path(workdir).absolute() / "checkpoints"
    newest = folder / str(max(int(p.name) for p in folder.iterdir() if p.name.isdigit()))
    found = []
    for part in ("params", "opt", "ema", "progress"):
        for file in sorted((newest / part).rglob(".zarray")):
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(file.parent)}}
            found.append(np.asarray(ts.open(spec).result().read().result()))
    assert len(found) > 20
    return found


def command(workdir: Path, store: str, *flags: str, module: str = "jaxlm.train") -> list[str]:
    path = Path(workdir) / "config.py"
    path.write_text(CONFIG)
    return [
        sys.executable,
        "-m",
        module,
        f"--config={path}",
        f"--workdir={workdir}",
        f"--config.store={store}",
        *flags,
    ]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class Started(subprocess.Popen):
    """A process that prints into a file: into a pipe that nobody reads yet, it would one day wait for ever."""

    running: ClassVar[list["Started"]] = []  # those of the test that runs now; conftest.py ends what a test leaves

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        file, self.printed = tempfile.mkstemp()
        with open(file, "wb") as stdout:
            super().__init__(command, env=env, stdout=stdout, stderr=subprocess.STDOUT)
        self.running.append(self)

    def finished(self, timeout: float = 600) -> str:
        """All that it has printed, when it has ended; it is killed when that takes too long."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as e:
            self.kill()
            self.wait()
            raise AssertionError(f"not finished after {timeout} s: {self.output()}") from e
        return self.output()

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.printed).read_text()


def start(workdir: Path, store: str, *flags: str, module: str = "jaxlm.train", **more: str) -> Started:
    """Start `jaxlm train` in a process of its own."""
    return Started(command(workdir, store, *flags, module=module), environment(**more))


def run(
    workdir: Path, store: str, *flags: str, check: int = 0, module: str = "jaxlm.train", **more: str
) -> str:  # fmt: skip
    """Run `jaxlm train` in a process of its own, and return what it prints."""
    process = start(workdir, store, *flags, module=module, **more)
    output = process.finished()
    assert process.returncode == check, output
    return output


def start_processes(count: int, workdir: Path, store: str, *flags: str, module: str = "jaxlm.train") -> list[Any]:
    """Start `jaxlm train` as `count` processes that find each other on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(count))
    one = functools.partial(start, workdir, store, f"--config.mesh.data={count}", *flags, module=module, **hosts)
    return [one(JAX_PROCESS_ID=str(i)) for i in range(count)]


def two_processes(workdir: Path, store: str, *flags: str, module: str = "jaxlm.train") -> list[str]:
    """Run `jaxlm train` as two processes that find each other on this machine, and return what they print."""
    both = start_processes(2, workdir, store, *flags, module=module)
    outputs = [process.finished() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    return outputs
