"""How a step's time and memory grow with depth, width, context, batch, vocabulary and devices, for `scripts/bench.py
costs`: `--variant=depth` measures one of them.

Each table varies one size and keeps the others (`BASE`, and what `ABOUT` says of it). An exponent is the slope of a
straight line through log(cost) over log(size): 1 doubles with the size, 2 is quadratic. `last` is that of the last two
points, where what does not grow matters least. Devices are a plan's (`jaxlm.plan`): no TPU is needed.
"""

import argparse
from collections.abc import Sequence
import math
import statistics
import time
from typing import Any

BASE = dict(layers=4, width=128, context=128, batch=8, vocab=512)
HEAD = 64  # width of a head
SIZES: dict[str, list[int]] = {
    "layers": [2, 4, 8, 12, 16, 24, 48],
    "width": [64, 128, 256, 512, 1024],
    "context": [256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768],
    "batch": [1, 2, 4, 8, 16, 32, 64],
    "vocab": [512, 2048, 8192, 32_768, 131_072],
    "devices": [4, 16, 64, 256],
    "devices, one batch": [4, 16, 64, 256],
}
ABOUT: dict[str, dict[str, int]] = {
    "width": dict(layers=2),
    "context": dict(layers=1, width=64, batch=1),
    "vocab": dict(layers=1),
    "devices": dict(layers=8, width=512, context=512, batch=2, vocab=8192),  # the batch of each device
    "devices, one batch": dict(layers=8, width=512, context=512, batch=256, vocab=8192),  # and that of all together
}
TPUS = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
SECONDS, FEWEST, MOST = 2.0, 2, 30  # a point is measured so long, with so many steps after the first


def costs(a: argparse.Namespace, axis: str) -> dict[str, Any]:
    """The table of one size, and the exponents of its columns."""
    measure = planned if axis.startswith("devices") else stepped
    rows = [dict(size=size) | measure(axis, size) for size in SIZES[axis]]
    columns = [name for name in rows[0] if name not in ("size", "compile_s") and all(row[name] for row in rows)]
    fitted = {name: exponent([row["size"] for row in rows], [row[name] for row in rows]) for name in columns}
    last = {name: exponent([row["size"] for row in rows[-2:]], [row[name] for row in rows[-2:]]) for name in columns}
    return dict(axis=axis, **BASE | ABOUT.get(axis, {}), rows=rows, exponents=fitted, last=last)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line through log(value) over log(size)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return round(statistics.linear_regression(x, y).slope, 2)


def stepped(axis: str, size: int) -> dict[str, Any]:
    """A train step of GPT-2 with AdamW on this machine: the medians of its wall and CPU time (all threads together),
    what the compiler sets aside beside state and batch, what these hold, and the time to compile.
    """
    import jax
    import numpy as np

    from jaxlm import axes, step
    from jaxlm.data.words import Words

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as `jaxlm train` does
    c = BASE | ABOUT.get(axis, {}) | {axis: size}
    mesh, rng = axes.mesh(devices=jax.devices()[:1]), np.random.default_rng(0)
    model = dict(
        name="gpt2", layers=c["layers"], heads=c["width"] // HEAD, width=c["width"], context=c["context"]
    )  # fmt: skip
    with axes.on(mesh):
        parts = step.assemble(
            model=model, optimizer=dict(name="adamw", lr=1e-3), steps=1000, length=c["context"],
            words=Words.of_size(c["vocab"]), mesh=mesh, rules=axes.RULES,
        )  # fmt: skip
        draw = lambda x: np.float32(0.02) * rng.standard_normal(x.shape, np.float32)  # noqa: E731
        state = step.init(parts.tx, jax.tree.map(lambda x: jax.device_put(draw(x)), parts.shapes["params"]), ema=0.0)
        ids = rng.integers(0, c["vocab"], (2, c["batch"], c["context"]), dtype=np.int32)
        given = dict(tokens=ids[0], labels=ids[1], weights=np.ones(ids[0].shape, np.float32))
        batch, begun = axes.put(given, c["batch"], mesh), time.perf_counter()
        compiled = parts.update.lower(parts.shapes, batch).compile()
        took, wall, cpu = time.perf_counter() - begun, [], []
        while len(wall) <= FEWEST or (sum(wall) < SECONDS and len(wall) <= MOST):
            start = time.perf_counter(), time.process_time()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
    memory = compiled.memory_analysis()
    assert memory is not None and np.isfinite(metrics["loss"])
    return dict(
        step_ms=round(statistics.median(wall[1:]) * 1e3, 2), cpu_ms=round(statistics.median(cpu[1:]) * 1e3, 2),
        temporary_mb=round(memory.temp_size_in_bytes / 2**20, 2),
        held_mb=round(memory.argument_size_in_bytes / 2**20, 2), compile_s=round(took, 2),
    )  # fmt: skip


def planned(axis: str, size: int) -> dict[str, Any]:
    """A Llama's step on so many TPUs, parameters split over all: rows for each of them, or for all together."""
    import jax

    from jaxlm import plan
    from jaxlm.data.words import Words

    jax.config.update("jax_platforms", "cpu")  # the TPUs are not here
    c = BASE | ABOUT[axis]
    config = dict(
        model=dict(name="llama", layers=c["layers"], width=c["width"], heads=4, kv_heads=4, mlp_width=4 * c["width"]),
        optimizer=dict(name="adamw", lr=1e-3), steps=1000, length=c["context"],
        batch=c["batch"] * (size if axis == "devices" else 1), mesh=dict(data=1, fsdp=size),
    )  # fmt: skip
    found = plan.make(config, plan.devices(TPUS[size]), words=Words.of_size(c["vocab"]))
    step, exposed = found.step_seconds or 0.0, found.exposed_seconds or 0.0
    return dict(
        step_ms=round(step * 1e3, 2), compute_ms=round((step - exposed) * 1e3, 2), sending_ms=round(exposed * 1e3, 2),
        temporary_mb=round(found.temporary_bytes / 2**20, 1),
        held_mb=round((found.parameter_bytes + found.optimizer_bytes) / 2**20, 1),
        compile_s=round(found.compile_seconds or 0.0, 1),
    )  # fmt: skip
