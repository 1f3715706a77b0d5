"""`jaxlm train` that keeps every batch it is given: what a run was trained on, byte for byte.

    python -m tests.recording --config=... --workdir=DIR       DIR/batches/STEP-FIRSTROW.npz, one for each process
    KILL_BEFORE=6 python -m tests.recording ...                kill -9 itself when it asks for the batch of step 6

A step that is trained twice, before and after a kill, must be given the same twice.
"""

import os
from pathlib import Path
import signal
import sys

import numpy as np

from jaxlm import program, train
from jaxlm.data import rows


def same(one, two) -> bool:
    """Whether two batches are the same, name by name and byte by byte."""
    return sorted(one) == sorted(two) and all(
        one[name].dtype == two[name].dtype and one[name].tobytes() == two[name].tobytes() for name in one
    )


def recorded(folder: Path, batches):
    """`rows.batches`, which leaves what it gives in `folder`."""

    def keep(dataset, *, batch, start_step=0, rows, **options):
        found = batches(dataset, batch=batch, start_step=start_step, rows=rows, **options)
        if len(dataset) < sys.maxsize:  # an evaluation's
            yield from found
            return
        for step, values in enumerate(found, start_step + 1):
            if step == int(os.environ.get("KILL_BEFORE", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            path = folder / f"{step:03}-{rows[0][0]}.npz"
            if path.exists():
                assert same(dict(np.load(path)), values), f"step {step} was given another batch than before"
            np.savez(path, **values)
            yield values

    return keep


def main() -> None:
    """Train, with the command line of `jaxlm train`."""
    workdir = next(arg.partition("=")[2] for arg in sys.argv if arg.startswith("--workdir="))
    folder = Path(workdir) / "batches"
    folder.mkdir(exist_ok=True)
    rows.batches = recorded(folder, rows.batches)
    program.run("train", train.main)


if __name__ == "__main__":
    main()
