"""Where the time of a compiled TPU program goes: the compiler's cycles, kernels, and what devices send.

    cost = Cost(hlo.read(compiled.as_text()), mesh, chips.of("TPU v6 lite"), torus(devices), slices=1)
    cost.step, cost.compute, cost.attention, cost.experts, cost.exposed, cost.hosted            seconds

Cycles are the compiler's own estimate of each operation, none for kernels. Attention's are counted by their FLOPs,
products by expert by theirs, or by what their blocks read where that takes longer.
"""

import math
import re
from typing import Any

import jax

from jaxlm import chips, hlo
from jaxlm.hlo import Operation
from jaxlm.lookup import Mistake

# Published time / the compiler's estimate, not of the very same programs (README, "Predicted and measured"): compiled
# without `xla_tpu_scoped_vmem_limit_kib`, with which a v6e is estimated a fifth to a quarter faster than published.
CYCLES = 0.88
KERNEL = 0.65  # share of the peak that attention kernels reach, fitted together with the above; taken for experts', too
PRODUCTS = {"_dkv": 4, "_dq": 3, "_fwd": 2}  # of B x N x T x S x H, in each of splash attention's kernels


def build(lowered: jax.stages.Lowered, advice: str) -> jax.stages.Compiled:
    """Compile. Raises `Mistake` for a program that does not fit, with the compiler's figures and the advice."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        raise _too_large(str(e), advice) from e


def _too_large(text: str, advice: str) -> Mistake:
    """What the compiler says of a program that it cannot place, in our words where it is about memory."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text) or re.search(
        r"\(?([\d.]+\w)\)? exceeds available HBM \(([\d.]+\w)\)", text
    )
    if found:
        return Mistake(f"does not fit: the step needs {found[1]} of the {found[2]} that a device has. {advice}")
    return Mistake(text.splitlines()[0])


def memory(program: jax.stages.Compiled, platform: str, room: float = math.inf) -> tuple[int, int]:
    """Bytes on a device when it holds most: of temporaries, and in all, what is given and given back included. Raises
    `Mistake` where the compiler does not tell.

    What a TPU's compiler tells of temporaries is more than it sets aside where the peak is in a loop: as much as the
    loop was handed, such as the inputs of all scanned layers. Its peak is not; but that has what lies in the vector
    memory, too, so that of small programs the other figure is nearer. Where the hosts hold something, its peak is of
    their memory and not of the device's; what is too much is then cut to the device's `room`, into which the compiler
    has put the program.
    """
    told = program.memory_analysis()
    if told is None:
        raise Mistake("this compiler tells nothing about memory")
    passed = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    temporary = told.temp_size_in_bytes
    if platform == "tpu" and told.host_temp_size_in_bytes:
        temporary = round(min(temporary, room - passed))
    elif platform == "tpu" and told.peak_memory_in_bytes > passed:
        temporary = min(temporary, told.peak_memory_in_bytes - passed)
    return temporary, passed + temporary


def count_chips(where: list[Any]) -> int:
    """How many chips the devices are; of some kinds, a chip is two."""
    return len({(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))) for d in where})


def torus(where: list[Any]) -> tuple[int, ...]:
    """How many chips the torus of one slice has along each axis."""
    places = [d.coords for d in where if getattr(d, "slice_index", 0) == getattr(where[0], "slice_index", 0)]
    return tuple(len({place[axis] for place in places}) for axis in range(3))


class Cost:
    """Where the time of a compiled TPU program goes."""

    def __init__(self, operations: list[Operation], mesh: Any, chip: chips.Chip, torus: tuple[int, ...], slices: int):
        self.operations, self.mesh, self.chip, self.torus, self.slices = operations, mesh, chip, torus, slices
        self.compute = sum(op.times * self.seconds(op) for op in operations if op.cycles)
        kernels = [op for op in operations if op.kind == "custom-call"]
        self.uncounted = sorted({op.name for op in kernels if not self.seconds(op)})
        self.attention = sum(op.times * self.seconds(op) for op in kernels if not op.tiling)
        self.experts = sum(op.times * self.seconds(op) for op in kernels if op.tiling)
        sends = [op for op in operations if op.kind in hlo.COLLECTIVES]
        beside = sum(op.times * self.link(op) for op in sends if op.begun)
        self.exposed = sum(op.times * self.link(op) for op in sends if not op.begun)
        busy = self.compute + self.attention + self.experts
        self.exposed += max(0.0, beside - busy)
        moves = [op for op in operations if op.kind in hlo.HOST]
        self.moved = sum(op.times * op.bytes for op in moves)  # bytes to the host's memory and back
        self.hosted = self.moved / chip.host if chip.host else None
        for place in {op.inside for op in moves} if chip.host else ():
            work = sum(op.times * self.seconds(op) for op in operations if op.inside == place)
            here = [op for op in moves if op.inside == place]
            ways = [sum(op.times * op.bytes for op in here if op.kind == way) for way in hlo.HOST]  # both at once
            self.exposed += max(0.0, max(ways) / chip.host - work)
        self.step = busy + self.exposed

    def seconds(self, op: Operation) -> float:
        """One run of a kernel, or of what has an estimate."""
        if op.kind != "custom-call":
            return CYCLES * op.cycles / self.chip.clock
        if op.tiling:
            return self._by_expert(op)
        products = next((n for name, n in PRODUCTS.items() if name in op.scope + op.name), 0)
        products += products == 4 and any(len(shape) == 5 for _, shape in op.sizes)  # one kernel for all gradients
        floats = [shape for dtype, shape in op.inputs if dtype in ("bf16", "f32") and len(shape) > 2]
        q, k = (floats + [(0, 0, 0)] * 2)[:2]  # [rows, heads, tokens, H]; a single row has no axis of its own
        return 2 * products * math.prod(q) * k[-2] * hlo.seen(op.scope) / (KERNEL * self.chip.flops)

    def _by_expert(self, op: Operation) -> float:
        """One run of the kernel that multiplies [rows, K] by their experts' [E, K, N]. Its blocks go over N first, over
        K last, and each is read anew unless it was the one before.
        """
        ((_, (room, K)), (_, (E, *matrix))), (tall, deep, wide) = op.inputs[-2:], op.tiling
        N = math.prod(matrix) // K
        times = E if deep >= K else max(E, op.rows / tall)
        read = (op.rows * K * math.ceil(N / wide) + times * K * N) * op.bytes / (room * N)
        return max(2 * op.rows * K * N / (KERNEL * self.chip.flops), read / self.chip.read)

    def link(self, op: Operation) -> float:
        """One run of a collective over the links that its group has."""
        inside = self.mesh.size // self.slices
        if self.slices > 1 and (op.group - 1) * op.stride >= inside:  # the slow network carries what one device sends
            return op.sent / self.chip.outside
        return op.sent / self.chip.within(op.group, self.torus)

    def dearest(self, count: int) -> list[dict[str, Any]]:
        """The lines of source whose operations take longest, forward and backward apart."""
        sums: dict[tuple[str, str], float] = {}
        for op in self.operations:
            passed = "backward" if "transpose(" in op.scope else "forward"
            passed = "recomputed" if "rematted" in op.scope else passed
            key = (op.source or op.name.partition(".")[0], passed)
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
        """The mesh axes that a collective joins, or joins parts of, by how far its neighbours are apart."""
        names, stride = [], self.mesh.size
        for name, size in self.mesh.shape.items():
            stride //= size
            if size > 1 and max(op.stride, stride) < min(op.stride * op.group, stride * size):
                names.append(name)
        return " x ".join(names) or "all"
