"""Compile a config's train step for devices that are not here: does it fit, how fast is it, what takes the time?

    jaxlm plan --config=configs/tpu/published.py:llama3.1-8b --topology=v6e:16x16
    jaxlm plan --config=configs/pretrain/python_docs.py --topology=v5e:4x4 --slices=2 --config.mesh.fsdp=16
    jaxlm plan --config=configs/tpu/published.py:llama3.1-8b --topology=v6e:16x16 --search

The topology is a TPU's (v4, v5e, v5p, v6e, tpu7x) and needs libtpu: pip install "jaxlm[tpu]". Without one, the devices
of this machine. Nothing is allocated: weights and batch are shapes. --search tries meshes, batch sizes and what the
backward pass keeps, and ranks what fits. --price, of a chip-hour, tells what the config's steps cost. --json prints one
object a plan.

The time is what the TPU's compiler expects of each operation (it writes estimated cycles into its program, none for
attention kernels), the attention kernels' FLOPs, and what devices send each other while nothing else runs.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlm import axes, chips, hlo, lookup, program, step
from jaxlm import config as configs
from jaxlm.data.store import open as open_store
from jaxlm.data.words import Words
from jaxlm.hlo import Operation
from jaxlm.lookup import Mistake
from jaxlm.nn import pipeline
from jaxlm.nn.stack import REMAT

CYCLES = 0.88  # measured time / the compiler's estimate, where both are known (README, "Predicted and measured")
KERNEL = 0.65  # share of the peak that attention kernels reach, fitted together with the above
PRODUCTS = {"_dkv": 4, "_dq": 3, "_fwd": 2}  # of B x N x T x S x H, in each of splash attention's kernels


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled train step will take, by one device unless said otherwise. Bytes, seconds, FLOPs."""

    model: str
    devices: int
    kind: str
    mesh: dict[str, int]
    batch: int
    length: int
    remat: str
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: float | None
    flops_per_token: float
    flops_per_step: float  # of the model, all devices together
    estimated_cycles: int
    compute_seconds: float | None
    attention_seconds: float | None
    exposed_seconds: float | None
    step_seconds: float | None
    roofline_seconds: float | None
    tokens_per_second_per_device: float | None
    mfu: float | None
    days: float | None  # for the config's steps
    dollars: float | None  # for them, where a price is given
    input_bytes_per_second: float | None  # of all hosts together
    compile_seconds: float
    uncounted: list[str]  # kernels whose time is not known, and so not in any of the above
    operations: list[dict[str, Any]]
    collectives: list[dict[str, Any]]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`. Raises `Mistake` without libtpu, or for a topology it does not
    know.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for the TPU machine that this is not
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices)
    except Exception as e:
        hint = "" if "libtpu" in sys.modules else '; if libtpu is missing: pip install "jaxlm[tpu]"'
        raise Mistake(f"--topology={topology}: {str(e).splitlines()[0]}{hint}") from e


def lower_step(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1
) -> tuple[step.Parts, dict[str, Any], jax.stages.Lowered]:
    """The parts of a run, the shapes of its batch and its train step, traced for these devices."""
    mesh = lookup.spend("config.mesh", axes.mesh, {**config.get("mesh", {}), "slices": slices}, devices=where)
    rules = {**axes.RULES, **config.get("rules", {})}
    names = ("model", "optimizer", "steps", "objective", "guard", "seed", "accumulate", "ema", "dtype")
    schedule = lookup.spend("config.pipeline", pipeline.Schedule, config.get("pipeline"))
    with axes.on(mesh, rules), pipeline.on(schedule):
        given = {n: config[n] for n in names if n in config}
        parts = step.assemble(words=words, mesh=mesh, rules=rules, length=config["length"], **given)
        pipeline.check(parts.blueprint.shapes, config["batch"] // config.get("accumulate", 1))
        names = ("tokens", "segments", *(("other_tokens", "other_segments") if parts.task.pairs else ()))
        row = {n: np.ones(parts.task.row, np.int32) for n in names}
        example, rows = parts.task.features(row, np.random.default_rng(0)), config["batch"]
        place = NamedSharding(mesh, axes.spec("B", (rows,), mesh, rules))
        batch = {n: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=place) for n, x in example.items()}
        return parts, batch, parts.update.lower(parts.shapes, batch)


def compile_step(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1
) -> tuple[step.Parts, jax.stages.Compiled]:
    """The parts of a run and its train step, compiled for these devices by the real compiler."""
    parts, _, lowered = lower_step(config, where, words=words, slices=slices)
    return parts, lowered.compile()


def make(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1, price: float = 0.0
) -> Plan:  # fmt: skip
    """Compile and weigh the train step; `price` is of a chip-hour. Raises `Mistake` when it does not fit, with the
    compiler's figures.
    """
    begun = time.perf_counter()
    parts, batch, lowered = lower_step(config, where, words=words, slices=slices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        raise _too_large(str(e)) from e
    took, memory = time.perf_counter() - begun, compiled.memory_analysis()
    if memory is None:
        raise Mistake(f"{where[0].device_kind}: this compiler tells nothing about memory")
    mesh = jax.tree.leaves(parts.shapes)[0].sharding.mesh
    operations = hlo.read(compiled.as_text() or "")
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    tokens = config["batch"] * config["length"]
    flops = parts.blueprint.flops_per_token(config["length"])
    chip = chips.of(where[0].device_kind)
    cost = _Cost(operations, mesh, chip, _torus(where), slices) if chip and chip.clock else None
    seconds = cost and cost.step
    return Plan(
        parts.blueprint.name, mesh.size, where[0].device_kind, dict(mesh.shape), config["batch"], config["length"],
        getattr(parts.blueprint.config, "remat", "none"), parts.blueprint.size, _held(parts.shapes["params"]),
        _held({n: x for n, x in parts.shapes.items() if n != "params"}), _held(batch), memory.temp_size_in_bytes,
        peak, chip and chip.hbm, flops, flops * tokens, sum(op.times * op.cycles for op in operations),
        cost and cost.compute, cost and cost.attention, cost and cost.exposed, seconds,
        chip and flops * tokens / mesh.size / chip.flops,
        seconds and tokens / mesh.size / seconds,
        seconds and chip and flops * tokens / mesh.size / seconds / chip.flops,
        seconds and seconds * config["steps"] / 86_400,
        (seconds and price and seconds * config["steps"] / 3_600 * _chips(where) * price) or None,
        seconds and sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) / seconds,
        took, cost.uncounted if cost else [], cost.dearest(10) if cost else [], cost.sent() if cost else [],
    )  # fmt: skip


def _held(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _too_large(text: str) -> Mistake:
    """What the compiler says of a step that it cannot place, in our words where it is about memory."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text) or re.search(
        r"\(?([\d.]+\w)\)? exceeds available HBM \(([\d.]+\w)\)", text
    )
    if found:
        return Mistake(
            f"does not fit: the step needs {found[1]} of the {found[2]} that a device has. Try a smaller config.batch, "
            "config.model.remat=full, or more devices under config.mesh.fsdp; --search tries them"
        )
    return Mistake(text.splitlines()[0])


def _chips(where: list[Any]) -> int:
    """How many chips the devices are; of some kinds, a chip is two."""
    return len({(getattr(d, "slice_index", 0), *d.coords) for d in where})


def _torus(where: list[Any]) -> tuple[int, ...]:
    """How many chips the torus of one slice has along each axis."""
    places = [d.coords for d in where if getattr(d, "slice_index", 0) == getattr(where[0], "slice_index", 0)]
    return tuple(len({place[axis] for place in places}) for axis in range(3))


class _Cost:
    """Where the time of a compiled TPU program goes."""

    def __init__(self, operations: list[Operation], mesh: Any, chip: chips.Chip, torus: tuple[int, ...], slices: int):
        self.operations, self.mesh, self.chip, self.torus, self.slices = operations, mesh, chip, torus, slices
        self.compute = sum(op.times * self.seconds(op) for op in operations if op.cycles)
        self.uncounted = sorted({op.name for op in operations if op.kind == "custom-call" and not self.seconds(op)})
        self.attention = sum(op.times * self.seconds(op) for op in operations if op.kind == "custom-call")
        sends = [op for op in operations if op.kind in hlo.COLLECTIVES]
        beside = sum(op.times * self.link(op) for op in sends if op.begun)
        self.exposed = sum(op.times * self.link(op) for op in sends if not op.begun)
        self.exposed += max(0.0, beside - self.compute - self.attention)
        self.step = self.compute + self.attention + self.exposed

    def seconds(self, op: Operation) -> float:
        """One run of a kernel, or of what has an estimate."""
        if op.kind != "custom-call":
            return CYCLES * op.cycles / self.chip.clock
        products = next((n for name, n in PRODUCTS.items() if name in op.scope + op.name), 0)
        products += products == 4 and any(len(shape) == 5 for _, shape in op.sizes)  # one kernel for all gradients
        floats = [shape for dtype, shape in op.inputs if dtype in ("bf16", "f32") and len(shape) > 2]
        q, k = (floats + [(0, 0, 0)] * 2)[:2]  # [rows, heads, tokens, H]; a single row has no axis of its own
        seen = float((re.search(r"seen_([\d.]+)", op.scope) or ["", "1"])[1])
        return 2 * products * math.prod(q) * k[-2] * seen / (KERNEL * self.chip.flops)

    def link(self, op: Operation) -> float:
        """One run of a collective over the links that its group has."""
        inside = self.mesh.size // self.slices
        if op.group * op.stride > inside:  # it crosses slices: the slow network carries what one device of each sends
            return op.sent / self.chip.outside
        return op.sent / self.chip.within(op.group, self.torus)

    def dearest(self, count: int) -> list[dict[str, Any]]:
        """The lines of source whose operations take longest, forward and backward apart."""
        sums: dict[tuple[str, str], float] = {}
        for op in self.operations:
            passed = "backward" if "transpose(" in op.scope else "forward"
            passed = "recomputed" if "rematted" in op.scope else passed
            key = (op.source or op.kind, passed)
            spent = self.link(op) if op.kind in hlo.COLLECTIVES else self.seconds(op)
            sums[key] = sums.get(key, 0.0) + op.times * spent
        top = sorted(sums.items(), key=lambda item: -item[1])[:count]
        return [dict(source=source, when=when, seconds=spent) for (source, when), spent in top]

    def sent(self) -> list[dict[str, Any]]:
        """Collectives by kind and mesh axes: how many a step, the bytes that a device sends, the time on the links."""
        sums: dict[tuple[str, str], list[float]] = {}
        for op in self.operations:
            if op.kind in hlo.COLLECTIVES:
                total = sums.setdefault((op.kind, self._axes(op)), [0, 0.0, 0.0])
                for i, x in enumerate((1, op.sent, self.link(op))):
                    total[i] += op.times * x
        rows = sorted(sums.items(), key=lambda item: -item[1][2])
        return [dict(kind=k, axes=a, count=int(n), bytes=b, seconds=s) for (k, a), (n, b, s) in rows]

    def _axes(self, op: Operation) -> str:
        """The mesh axes that a collective joins, by how far its neighbours are apart."""
        names, stride = [], self.mesh.size
        for name, size in self.mesh.shape.items():
            stride //= size
            if size > 1 and op.stride <= stride < op.stride * op.group:
                names.append(name)
        return " x ".join(names) or "all"


def search(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1, price: float = 0.0
) -> Iterator[Plan | str]:
    """Plans of the config on other meshes, by other remat policies and with half and double the batch; of what fails,
    why. A larger batch than one that does not fit is not tried.
    """
    count = len(where) // slices
    splits = [(f, t) for t in (1, 2, 4, 8) for f in _divisors(count // t) if count % t == 0 and f * t * 8 >= count]
    for (fsdp, tensor), remat in itertools.product(splits, REMAT):
        for batch in (config["batch"] // 2, config["batch"], config["batch"] * 2):
            ways = len(where) // tensor
            if not batch or batch % (ways * config.get("accumulate", 1)):
                continue
            mesh = dict(data=-1, fsdp=fsdp, tensor=tensor)
            tried = {**config, "batch": batch, "mesh": mesh, "model": {**config["model"], "remat": remat}}
            name = f"fsdp {fsdp}, tensor {tensor}, remat {remat}, batch {batch}"
            try:
                yield make(tried, where, words=words, slices=slices, price=price)
            except Mistake as mistake:
                yield f"{name}: {mistake}"
                break


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def show(plan: Plan, console: Console) -> None:
    """Print a plan as tables."""
    gb = lambda n: f"{n / 1e9:.2f} GB"  # noqa: E731
    table = Table(title=f"{plan.model} on {plan.devices} x {plan.kind}, {_mesh(plan)}", show_header=False)
    rows: dict[str, str] = {
        "parameters": f"{plan.parameters:,}",
        "a device holds of them": gb(plan.parameter_bytes),
        "of the optimizer": gb(plan.optimizer_bytes),
        "of the batch": gb(plan.batch_bytes),
        "of activations and other temporaries": gb(plan.temporary_bytes),
        "at the peak": gb(plan.peak_bytes) + (f" of {gb(plan.hbm_bytes)}" if plan.hbm_bytes else ""),
        "model FLOPs per token, per step": f"{plan.flops_per_token:.3g}, {plan.flops_per_step:.3g}",
    }
    if plan.step_seconds is not None and plan.roofline_seconds is not None:
        rows |= {
            "step": f"{plan.step_seconds:.3f} s; at the peak of all units {plan.roofline_seconds:.3f} s",
            "of it products and the rest": f"{plan.compute_seconds:.3f} s ({plan.estimated_cycles / 1e9:.3f} G cycles)",
            "attention kernels": f"{plan.attention_seconds:.3f} s",
            "sending, while nothing else runs": f"{plan.exposed_seconds:.3f} s",
            "tokens/s a device": f"{plan.tokens_per_second_per_device:,.0f}",
            "MFU": f"{plan.mfu:.1%}",
            "the config's steps take": f"{plan.days:.2f} days" + (f", {plan.dollars:,.0f} $" if plan.dollars else ""),
            "input, all hosts": f"{(plan.input_bytes_per_second or 0) / 1e6:.1f} MB/s",
        }
    for label, text in (rows | {"compiled in": f"{plan.compile_seconds:.1f} s"}).items():
        table.add_row(label, text)
    console.print(table)
    if plan.uncounted:
        console.print(f"Not in these times, as nothing tells how long they take: {', '.join(plan.uncounted)}")
    if plan.operations:
        table = Table("ms a step", "asked for by", "", title="What takes longest")
        for row in plan.operations:
            table.add_row(f"{row['seconds'] * 1e3:.1f}", row["source"], row["when"])
        console.print(table)
    if plan.collectives:
        table = Table("over", "kind", "a step", "sent by a device", "ms", title="What devices send each other")
        for row in plan.collectives:
            sent = f"{row['bytes'] / 1e9:.3f} GB"
            table.add_row(row["axes"], row["kind"], str(row["count"]), sent, f"{row['seconds'] * 1e3:.1f}")
        console.print(table)


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"


def _words(config: Mapping[str, Any]) -> Words:
    """The tokenizer of the config's store; before there is one, a stand-in of the size that it will have."""
    size = ((config.get("prepare") or {}).get("tokenizer") or {}).get("vocab")
    if size is not None and not epath.Path(config["store"]).exists():
        return Words.of_size(size)
    return Words.of(open_store(config["store"]).tokenizer())


def main(argv: list[str]) -> None:
    """Read the command line, compile, print what a device holds and what a step takes."""
    args = configs.parse(__doc__ or "", argv, workdir=None, topology="", slices=1, price=0.0, search=False, json=False)
    config = args.config.to_dict()
    words = _words(config)
    if args.topology:
        jax.config.update("jax_platforms", "cpu")  # those that the program is for are not here
    where, console = devices(args.topology, args.slices) if args.topology else jax.devices(), Console()
    if not args.search:
        plans = [make(config, where, words=words, slices=args.slices, price=args.price)]
    else:
        plans = []
        for plan in search(config, where, words=words, slices=args.slices, price=args.price):
            told = plan if isinstance(plan, str) else f"{_mesh(plan)}, {plan.remat}, {plan.batch}: fits"
            console.print(told, highlight=False)
            plans += [plan] if isinstance(plan, Plan) else []
        plans.sort(key=lambda plan: -(plan.tokens_per_second_per_device or 0.0))
        if not plans:
            raise Mistake("nothing that was tried fits")
    if args.json:
        for plan in plans:
            print(json.dumps(dataclasses.asdict(plan)))
    elif args.search:
        table = Table("mesh", "remat", "batch", "peak", "tokens/s a device", "MFU", title="What fits, fastest first")
        for plan in plans:
            table.add_row(
                _mesh(plan), plan.remat, str(plan.batch), f"{plan.peak_bytes / 1e9:.1f} GB",
                f"{plan.tokens_per_second_per_device or 0:,.0f}", f"{plan.mfu or 0:.1%}",
            )  # fmt: skip
        console.print(table)
    else:
        show(plans[0], console)


if __name__ == "__main__":
    program.run("plan", main)
