"""Several hosts train together: how they meet, and how all of them end when one dies.

    with Together(workdir, meet=True):    a host that dies ends the job on the others within BOUND seconds, each with
        train(workdir, ...)               a line of who died, what was saved and how to go on, and exit code 75

JAX alone waits 100 s and aborts without saying who it was, or for ever in a collective. Here each process gives a sign
of life every second, process 0 says which of them are missed, and all end upon its verdict. Where a collective fails at
once, as on a CPU or GPU whose peer closed its connection, GRACE seconds of silence are enough to tell who died. When
process 0 itself dies, JAX aborts the others, and the last word is theirs. Read `_judge` first.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from etils import epath
import jax
from jax._src import distributed  # where the key-value store is, to Orbax as well: jax.distributed does not hand it out

from jaxlm import program
from jaxlm.lookup import Mistake

BEAT, GRACE, BOUND = 1.0, 10.0, 60.0  # seconds: between signs; of silence after a failure; from a death to all ends
SILENCE = BOUND - 15.0  # of silence at any time: then a verdict is spoken, read by all, and obeyed
CODE = os.EX_TEMPFAIL  # of a process that ends because another died: the same command may well succeed


class Together:
    """A context for the work of one process among several; of a single process it does nothing.

    They meet at JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), or with `meet` where the cluster
    tells JAX.
    """

    def __init__(self, workdir: str, *, meet: bool = False):
        self._workdir, self._error, self._over = workdir, None, threading.Event()
        if "JAX_COORDINATOR_ADDRESS" in os.environ:
            count, index = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
            jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)
        elif meet:
            jax.distributed.initialize()
            if os.environ.get("JAX_COMPILATION_CACHE_DIR") == str(program.compiled_folder()):  # as `keep_compiled` says
                jax.config.update("jax_compilation_cache_dir", None)
        self._me, self._many = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client

    def __enter__(self) -> "Together":
        if self._many > 1:
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            _on_abort(self._handler)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if self._many == 1:
            return
        self._error = error
        if error is None:
            self._over.set()
            _on_abort(None)
            self._tell("done")
        else:  # the others wait for this process in vain, and so they end
            with contextlib.suppress(Exception):  # where process 0 is gone, and `_aborted` about to be called
                self._tell(f"failed {socket.gethostname()} {type(error).__name__}: {error}".splitlines()[0][:300])
            if not isinstance(error, Mistake):  # which every process meets: a line, and no more
                time.sleep(3 * GRACE)  # in which the verdict ends this process: was it the first to fail, or another?

    def _tell(self, sign: str) -> None:
        self._client.key_value_set(f"jaxlm/sign/{self._me}", sign, allow_overwrite=True)

    def _watch(self) -> None:
        """Give signs of life, and end this process upon a verdict."""
        client, seen = self._client, {}
        while not self._over.wait(BEAT):
            try:
                if not self._error:
                    self._tell(f"alive {socket.gethostname()} {time.time_ns()}")
                signs = dict(client.key_value_dir_get("jaxlm/sign/")) if self._me == 0 else {}
                verdict = self._judge({int(key.rpartition("/")[2]): sign for key, sign in signs.items()}, seen)
                if verdict:
                    client.key_value_set("jaxlm/verdict/0", verdict, allow_overwrite=True)
                    time.sleep(3 * BEAT)  # the others must read it before this process, which keeps it, is gone
                for _, verdict in client.key_value_dir_get("jaxlm/verdict/"):
                    self._end(verdict)
            except Exception:  # the store is gone, and with it process 0: `_aborted` comes next
                continue

    def _judge(self, signs: dict[int, str], seen: dict[int, tuple[str, float]]) -> str:
        """Who died or failed, in words; "" while all is well. `seen` keeps each process's last sign and its time."""
        now = time.monotonic()
        for process, sign in signs.items():
            if seen.get(process, ("",))[0] != sign:
                seen[process] = (sign, now)
        failed = {process: came for process, (sign, came) in seen.items() if sign.startswith("failed ")}
        patience = GRACE if failed else SILENCE
        for process, (sign, came) in seen.items():
            if sign.startswith("alive ") and now - came > patience:
                host = sign.split()[1]
                return f"process {process} of {self._many} on {host} died: no sign of life for {now - came:.0f} s"
        for process in sorted(failed, key=failed.__getitem__):
            if now - failed[process] > 2 * GRACE:  # as long as one that died in silence would be told by that
                _, host, why = seen[process][0].split(maxsplit=2)
                return f"process {process} of {self._many} on {host} failed: {why}"
        return ""

    def _aborted(self, _: int) -> None:
        """JAX aborts: process 0 is gone. A thread that aborts does so between two of its own instructions, so that
        Python may run once more; what then hangs is ended by the alarm.
        """
        if isinstance(self._error, Mistake):  # it was this process that failed, and has told why
            os._exit(2)
        self._end(f"process 0 of {self._many}, where they meet, died or cannot be reached")

    def _end(self, verdict: str) -> None:
        signal.alarm(30)  # a bucket may not answer, or an output not be read
        if self._error and verdict.startswith(f"process {self._me} "):
            traceback.print_exception(self._error)
        saved = epath.Path(self._workdir) / "checkpoints"
        steps = [int(p.name) for p in saved.iterdir() if p.name.isdigit()] if saved.exists() else []
        kept = f"step {max(steps)} is saved in {self._workdir}" if steps else "nothing was saved yet"
        print(
            f"jaxlm train: {verdict}. Process {self._me} ends with it; {kept}. The same command, on as many hosts or "
            f"another number of them, goes on {'from there' if steps else 'from the start'}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(CODE)


def _on_abort(handler: Any) -> None:
    """Have `handler`, a C function, called where a thread aborts; Python's own would be called too late."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p) if handler else None)
