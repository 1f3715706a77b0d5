"""What a run says: metrics as JSON lines and TensorBoard events, a progress bar on a terminal, plain lines elsewhere.

with Log(workdir, start_step=500, steps=2000) as log:      lines of steps beyond 500, from a run that died, are dropped
    log.train(501, dict(loss=2.1, lr=1e-3), tokens=12_288)
    log.evaluation(1000, "docs", dict(loss=1.9, bits_per_byte=1.7))
"""

from collections.abc import Mapping
import json
import logging
import math
import sys
import threading
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from jaxlm import chips
from jaxlm.paths import SECONDS, Mirror
from jaxlm.program import is_disk_full


def lines(workdir: str) -> list[dict[str, Any]]:
    """The metrics of a run so far; a last line that a kill cut short is left out, and what else is damaged."""
    path = epath.Path(workdir) / "metrics.jsonl"
    out = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in ("step", "time")):
            out.append(found)
    return out


def setup() -> None:
    """Send the package's own log lines to standard error, and keep the libraries' to warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jaxlm").setLevel(logging.INFO)
    for noisy in ("absl", "asyncio", "orbax"):  # they log with tracebacks what they also raise, where we answer it
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(event: Any) -> None:  # reads and writes still under way when Orbax gives up find their loop closed
        if "Event loop is closed" not in str(event.exc_value):
            before(event)

    sys.unraisablehook = hook
    threading.excepthook = lambda event: is_disk_full(event.exc_value) or threading.__excepthook__(event)


class Log:
    """The log of one run. Only the first process writes; the others' calls do nothing."""

    def __init__(self, workdir: str, *, start_step: int, steps: int, flops_per_token: float = 0.0):
        self.writes = jax.process_index() == 0
        self.start_step, self.steps = start_step, steps
        self.flops_per_token = flops_per_token
        self._began = self._last_time = time.monotonic()
        self._tokens, self._steps, self._waited, self._readied, self.tokens_per_s = 0, 0, 0.0, 0.0, 0.0
        if not self.writes:
            return
        kept = [line for line in lines(workdir) if line["step"] <= start_step]
        self._earlier = max((line.get("time", 0.0) for line in kept), default=0.0)
        self._mirror = Mirror(workdir)
        path = self._mirror.folder / "metrics.jsonl"
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        fresh.replace(path)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(  # an endless queue: its thread dies on a full disk, and must not block ours
            str(self._mirror.folder / "events"),
            purge_step=start_step + 1 if start_step else None,
            max_queue=0,
            flush_secs=SECONDS,
        )
        self._console = Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start_step)

    def __enter__(self) -> "Log":
        if self.writes:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._bar.stop()
            self._file.close()
            self._events.close()
            self._mirror.close()

    def sync(self) -> None:
        """Have all that was logged in the workdir: what a checkpoint there was preceded by must not be lost."""
        if self.writes:
            self._mirror.sync()

    def say(self, text: str) -> None:
        """Print a line for the user."""
        if self.writes:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tick(self, step: int, tokens: int) -> None:
        """Note that a step is done, which trained on this many real tokens."""
        self._tokens += tokens
        if self.writes:
            self._bar.update(self._task, completed=step)

    def waited(self, seconds: float, readied: float) -> None:
        """Note how long this host waited for a step's batch, and how long it took to have it on its devices, the wait
        included.
        """
        self._waited += seconds
        self._readied += readied
        self._steps += 1

    def pause(self) -> None:
        """Start the clock of tokens/s anew: what came before (an evaluation, a save) was no training."""
        self._last_time, self._tokens, self._steps, self._waited, self._readied = time.monotonic(), 0, 0, 0.0, 0.0

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step; since the last such line, tokens/s, the seconds waited for data and their share
        of the time, and which host held up the others (see `_hosts`); MFU and memory where the device tells.
        """
        now = time.monotonic()
        passed = max(now - self._last_time, 1e-9)
        self.tokens_per_s = self._tokens / passed
        hosts = _hosts(self._waited, passed, self._readied / max(self._steps, 1))
        self.pause()
        values = {**values, "tokens_per_s": self.tokens_per_s, **hosts, **self._device()}
        self._write(step, values)
        if self.writes:
            left = (self.steps - step) * (now - self._began) / max(step - self.start_step, 1)
            parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}", f"{self.tokens_per_s:,.0f} tokens/s"]
            parts += [f"data wait {100 * values['wait_share']:.1f} %"]
            parts += [f"host {hosts['slowest_host']} {hosts['behind_s']:.3f} s behind"] if "behind_s" in hosts else []
            parts += [f"MFU {100 * values['mfu']:.1f} %"] if "mfu" in values else []
            self._bar.update(self._task, description="  ".join(parts))
            if not self._console.is_terminal:
                self.say(f"step {step}/{self.steps}  {'  '.join(parts)}  {_clock(left)} left")

    def evaluation(self, step: int, name: str, values: Mapping[str, float]) -> None:
        """Write and print what an evaluation found."""
        self._write(step, values, {"eval": name})
        self.say(f"step {step}  {name}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def _write(self, step: int, values: Mapping[str, float], tags: Mapping[str, str] | None = None) -> None:
        if not self.writes:
            return
        elapsed = round(self._earlier + time.monotonic() - self._began, 3)
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **(tags or {}), **finite, "time": elapsed}) + "\n")
        folder = (tags or {}).get("eval", "train")
        for key, value in values.items():
            self._events.add_scalar(f"{folder}/{key}", value, step)

    def _device(self) -> dict[str, float]:
        device = jax.local_devices()[0]
        out = {}
        chip = chips.of(device.device_kind)  # of others no MFU is told
        if chip and self.flops_per_token:
            out["mfu"] = self.tokens_per_s * self.flops_per_token / (chip.flops * jax.device_count())
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform != "cpu" else None
        return out | ({"memory_gb": memory / 1e9} if memory else {})


def _hosts(waited: float, passed: float, readied: float) -> dict[str, float]:
    """What all hosts say of the steps since the last line: the wait for data (seconds, share) of the one that waited
    most, and of several the `slowest_host`, `behind_s` seconds a step later than the median with its batch.

    Steps end together on all hosts, so that the time of a step tells nothing of who was late; the time until a host has
    handed its batch to its devices does. It costs one collective of three numbers.
    """
    own = np.array([waited, min(waited / passed, 1.0), readied], np.float32)
    each = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, 3)  # [hosts, 3]
    waits = {"wait_s": float(each[:, 0].max()), "wait_share": float(each[:, 1].max())}
    if len(each) == 1:
        return waits
    slowest = int(each[:, 2].argmax())
    return waits | {"slowest_host": slowest, "behind_s": float(each[slowest, 2] - np.median(each[:, 2]))}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
