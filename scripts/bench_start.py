"""Measurement of how long a program takes to its first step, for `scripts/bench.py start`."""

import argparse
import os
from pathlib import Path
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).parents[1]
VARIANTS = ["tiny", "full"]


def start(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Seconds from the command to the first step of the quickstart's config: with nothing kept of what was compiled,
    as the first command of all, and (the median of three) as a later one.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if "_CACHE_" not in k}
        environment |= {"XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        config = [f"--config={ROOT}/configs/quickstart.py:{variant}", f"--config.store={folder}/store"]

        def program(name: str, *flags: str, **more: str) -> subprocess.Popen:
            line = [sys.executable, "-m", "jaxlm", name, *config, *flags]
            kept = dict(env=environment | more, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            return subprocess.Popen(line, **kept)  # type: ignore[arg-type]

        def first_step(run: str, **more: str) -> float:
            begun, took = time.perf_counter(), 0.0
            flags = f"--workdir={folder}/{run}", "--config.steps=2", "--config.every.log=1"
            with program("train", *flags, "--config.optimizer.warmup=1", **more) as process:
                for line in process.stdout or ():
                    if re.match(r"step 1/2\b", line):
                        took = time.perf_counter() - begun
            assert took and not process.returncode, f"jaxlm train ended with {process.returncode}"
            return round(took, 2)

        program("prepare").communicate()
        without = first_step("without", JAX_COMPILATION_CACHE_DIR="")
        first, *later = (first_step(f"run{i}") for i in range(4))
        kept = [file for file in Path(folder, "cache/jaxlm").rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in kept)
    return dict(
        config=variant, without_s=without, first_s=first, later_s=statistics.median(later), kept_mb=round(size / 1e6, 1)
    )
