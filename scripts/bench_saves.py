"""What checkpoints cost: step times with saves and without, and memory, for `scripts/bench.py saves` and `memory`."""

import argparse
import functools
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

VARIANTS = {"saves": ["never", "every 10"], "memory": ["params", "params and adamw"]}


def saves(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Percentiles of 60 step times of a GPT-2 of this shape, the call that saves included, and the CPU time of all
    threads over these steps until all is written.
    """
    import jax
    import numpy as np

    from jaxlm import axes, step
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.data.words import Words

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mesh, times, calls = axes.mesh(devices=jax.devices()[:1]), [], []
    with axes.on(mesh), tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        parts = step.assemble(
            model=dict(name="gpt2", layers=a.layers, heads=a.heads, width=a.width, context=a.context),
            optimizer=dict(name="adamw", lr=1e-3), steps=1000, length=a.context, words=Words.of_size(a.vocab),
            mesh=mesh, rules=axes.RULES, dtype="float32",
        )  # fmt: skip
        state = jax.jit(functools.partial(step.init, parts.tx, ema=0.0))(parts.blueprint.init(0))
        ids = np.random.default_rng(0).integers(0, a.vocab, (2, a.batch, a.context), dtype=np.int32)
        batch = dict(tokens=ids[0], labels=ids[1], weights=np.ones(ids[0].shape, np.float32))
        for i in range(-10, 60):  # the first ten compile, and the first save, too
            if i == 0:
                checkpoints.wait()
                used = time.process_time()
            start = time.perf_counter()
            state, _ = jax.block_until_ready(parts.update(state, axes.put(batch, a.batch, mesh)))
            stepped = time.perf_counter()
            if i == -5 or (variant == "every 10" and i >= 0 and i % 10 == 0):
                checkpoints.save(i + 10, state)
                calls += [time.perf_counter() - stepped]
            times += [time.perf_counter() - start]
        checkpoints.wait()
        used = time.process_time() - used
        size = sum(x.nbytes for x in jax.tree.leaves(state))
    p50, p95, most = (round(1e3 * float(np.percentile(times[10:], p)), 1) for p in (50, 95, 100))
    called = round(1e3 * statistics.median(calls[1:]), 1) if calls[1:] else 0.0
    return dict(
        saves=variant, state_mb=round(size / 1e6), p50_ms=p50, p95_ms=p95, max_ms=most, save_call_ms=called,
        cpu_ms_a_step=round(1e3 * used / 60, 1),
    )  # fmt: skip


def memory(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """The most memory that saving and restoring take, over the size of what is saved, which is held meanwhile: by the
    process that saves from the beginning, by the one that restores at the end. Each is a process of its own.
    """
    shape = dict(layers=a.layers, width=a.width, vocab=a.vocab, context=a.context)
    found: dict[str, Any] = dict(state=variant, **shape)
    with tempfile.TemporaryDirectory() as folder:
        for what in ("save", "restore"):
            asked = [
                sys.executable,
                __file__,
                what,
                folder,
                json.dumps(shape | dict(copies=3 if "adamw" in variant else 1)),
            ]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found |= json.loads(done.stdout.splitlines()[-1])
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return found | dict(files=len(files), disk_gb=round(sum(f.stat().st_size for f in files) / 1e9, 2))


def _held(what: str, folder: str, layers: int, width: int, vocab: int, context: int, copies: int) -> dict[str, Any]:
    """Save noise in GPT-2's shape in `folder`, or restore it, and tell the peak and the time."""
    import jax
    import jax.numpy as jnp

    from jaxlm import axes
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.models import Blueprint

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mesh = axes.mesh(devices=jax.devices()[:1])
    model = dict(name="gpt2", layers=layers, heads=width // 64 or 1, width=width, context=context)
    shapes = Blueprint.of(model, vocab=vocab).shapes
    shapes = dict(zip(("params", "mu", "nu"), [shapes] * copies))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    noise = jax.jit(
        lambda key, shape, dtype: jax.lax.map(  # a few rows at a time: what makes an array is not to be the peak
            lambda key: jax.random.normal(key, shape[1:], dtype), jax.random.split(key, shape[0])
        ),
        static_argnames=("shape", "dtype"),
    )
    jax.block_until_ready(jnp.zeros(8) + 1)
    with Checkpoints(folder) as checkpoints:
        before = _memory("VmRSS")
        if what == "save":
            leaves, form = jax.tree.flatten(shapes)
            leaves = [noise(jax.random.key(i), shape=x.shape, dtype=x.dtype) for i, x in enumerate(leaves)]
            state = jax.block_until_ready(jax.tree.unflatten(form, leaves))
        began = time.perf_counter()
        if what == "save":
            checkpoints.save(1, state)
            called = time.perf_counter() - began
            checkpoints.wait()
        else:
            places = axes.shardings(shapes, mesh)
            restored = checkpoints.restore(
                jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
            )
            assert restored and restored[0] == 1
        took = time.perf_counter() - began
    ratio = (_memory("VmHWM") - before) / size
    found = {"size_gb": round(size / 1e9, 2), what: round(ratio, 2), f"{what}_s": round(took, 1)}
    return found | ({"save_call_s": round(called, 2)} if what == "save" else {})


def _memory(kind: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or has held at most (VmHWM)."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(told[kind].split()[0])


if __name__ == "__main__":
    print(json.dumps(_held(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
