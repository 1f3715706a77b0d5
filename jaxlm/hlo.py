"""Read a compiled program: which operations it runs, how often, at what cost, and what it sends between devices.

    operations = hlo.read(compiled.as_text())
    sum(op.times * op.cycles for op in operations)          a TPU's compiler writes down what it expects of each

A loop's body is counted as often as the loop runs. Of a choice the dearest branch counts; in a scope `seen_0.6`, as in
`nn/context.py`, six times in ten; in a scope `wanted`, as in `decode/sampling.py`, unless told that nobody asks for it.
What is fused into one operation is one, but for collectives, which are listed wherever they are. What is sent to other
slices through the host is a collective, too, and begun: the program of one slice does it by `send` and `recv`. What is
kept in the host's own memory is moved `to-host` and `from-host`, begun as well.

A product by expert counts for the rows that there are where all experts get as much, and not for those that there is
room for. The gradient of the experts' weights is written as a product of every row with every expert, which skips what
is not an expert's own: it counts once a row.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "token": 0, "bf16": 2, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

HOST = ("to-host", "from-host")

SKIPS = '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_ITERATION_INDICES"'  # where a mask of the rows is false

HELPERS = ("jaxlm/nn/linear.py", "jaxlm/axes.py")  # that others call: of them it is the caller that is told

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", re.DOTALL)
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of the program."""

    name: str
    kind: str  # fusion, all-gather, custom-call, ...
    times: float  # how often a step runs it
    cycles: int  # what one run costs, where the compiler says so
    sizes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result
    inputs: tuple[tuple[str, tuple[int, ...]], ...]  # the same of a kernel's operands, where they are written down
    scope: str  # the path of named scopes that it was traced in
    source: str  # file:line of jaxlm's own code that asked for it
    group: int = 1  # of a collective: how many devices take part
    stride: int = 1  # and how far they are apart in the mesh
    begun: bool = False  # whether it runs beside others until it is waited for
    rows: int = 0  # of a product by expert: how many come
    tiling: tuple[int, ...] = ()  # of its kernel: how many of [rows, K, N] it multiplies at a time
    inside: str = ""  # the computation that it stands in: a loop's body, or the entry

    @property
    def bytes(self) -> int:
        """Of the results."""
        return sum(map(_bytes, self.sizes))

    @property
    def sent(self) -> float:
        """Bytes that each device of a collective's group sends in one run, by the ring algorithm."""
        whole, share = self.bytes, (self.group - 1) / self.group
        return {
            "all-gather": share * whole, "all-reduce": 2 * share * whole, "reduce-scatter": share * whole * self.group,
            "all-to-all": share * whole, "ragged-all-to-all": share * whole, "collective-permute": whole,
        }.get(self.kind, 0.0)  # fmt: skip


def _bytes(size: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = size
    width = BYTES.get(dtype) or int((re.search(r"\d+", dtype) or ["32"])[0]) / 8
    return int(math.prod(shape) * width)


def read(text: str, unknown: int = 1, wanted: bool = True) -> list[Operation]:
    """The operations that a step runs. Those without a cost (parameters, tuples, bitcasts) are left out. A loop whose
    bound is not written down, as an argument's is not, counts `unknown` times; what stands in a scope `wanted` only if
    that is so.
    """
    computations, entry = _computations(text)
    places, devices = _Places(text), int((re.search(r"\bnum_partitions=(\d+)", text) or ["", "1"])[1])

    @functools.cache
    def weight(name: str) -> float:
        return sum(op.times * op.cycles for op in walk(name, 1))

    def walk(name: str, times: float) -> Iterator[Operation]:
        for line in computations.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            kind, rest = match[3], match[4]
            called = lambda key, rest=rest: re.findall(rf"\b{key}=%?([\w.-]+)", rest)  # noqa: E731
            if kind == "while":
                yield from walk(called("body")[0], times * _trips(computations, called("condition")[0], line, unknown))
                continue
            if kind == "conditional":
                if not wanted and re.search(r'op_name="[^"]*\bwanted/', rest):
                    continue
                branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
                names = re.findall(r"[\w.-]+", branches[1]) if branches else called(r"(?:true|false)_computation")
                yield from walk(max(names, key=weight), times * seen(rest))
                continue
            if kind in ("call", "async-start"):
                yield from walk((called("to_apply") or called("calls"))[0], times)
                continue
            if kind == "fusion":
                inside = called("calls")[0]
                yield from _sending(walk(inside, times), inside, "".join(computations.get(inside, ())), match, places)
            operation = _moved(match, times) or _operation(match, times, places) or _crossing(match, times, devices)
            if operation and operation.kind == "ragged-all-to-all":
                operation = _evenly(operation, rest, computations[name])
            if operation and SKIPS in rest:
                operation = _own(operation, computations[called("calls")[0]])
            if operation is not None:
                yield dataclasses.replace(operation, inside=name)

    return _filled(list(walk(entry, 1)))


def seen(scope: str) -> float:
    """What share of something is computed, as the scope that it was traced in says: `seen_0.6`; all where none does."""
    return float((re.search(r"seen_([\d.]+)", scope) or ["", "1"])[1])


def _operation(match: re.Match, times: float, places: "_Places") -> Operation | None:
    name, result, kind, rest = match.groups()
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    base, begun = kind.removesuffix("-start"), kind.endswith("-start")
    kernel = 'custom_call_target="tpu_custom_call"' in rest
    if base not in COLLECTIVES and not cycles and not kernel:
        return None
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}\}", rest, re.DOTALL)
    sizes, inputs = _sizes(result), _sizes(operands[1]) if kernel and operands else ()
    tiling = re.search(r'ragged_dot_tiling="([\d,]+)"', rest)
    if begun and base in COLLECTIVES and base != "all-reduce" and len(sizes) > 1:
        sizes = sizes[1:2]  # what is begun holds its operand, too
    group, stride = _group(rest) if base in COLLECTIVES else (1, 1)
    return Operation(
        name, base if base in COLLECTIVES else kind, times, int(cycles[1]) if cycles else 0, sizes, inputs,
        *_asked(rest, places), group, stride, begun, inputs[-2][1][0] if tiling and inputs else 0,
        tuple(map(int, tiling[1].split(","))) if tiling and inputs else (),
    )  # fmt: skip


def _asked(rest: str, places: "_Places") -> tuple[str, str]:
    """The scopes that an operation was traced in, and the line of source that asked for it."""
    scope = re.search(r'op_name="([^"]*)"', rest)
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    return scope[1] if scope else "", places.of(int(frame[1])) if frame else places.written(rest)


def _sending(
    inside: Iterator[Operation], name: str, text: str, fusion: re.Match, places: "_Places"
) -> Iterator[Operation]:
    """The collectives of what is fused; of those that go on beside several fusions, the one that begins them tells."""
    begins = '"AsyncCollectiveStart"' in text
    if not begins and (name.startswith("async_collective_fusion") or '"AsyncCollectiveDone"' in text):
        return
    for op in (op for op in inside if op.kind in COLLECTIVES):
        one = _scattered(op, fusion, places) if name.startswith("all-reduce-scatter") else op
        yield dataclasses.replace(one, begun=one.begun or begins)


def _scattered(op: Operation, fusion: re.Match, places: "_Places") -> Operation:
    """A TPU's reduce-scatter, which is written as a fusion of a sum and the cut of what is a device's own of it."""
    scope, source = _asked(fusion[4], places)
    return dataclasses.replace(op, kind="reduce-scatter", sizes=_sizes(fusion[2]), scope=scope, source=source)


def _crossing(match: re.Match, times: float, devices: int) -> Operation | None:
    """What a device exchanges with those in its place in other slices, of so many devices each: what it receives is
    the collective's result.
    """
    name, result, kind, rest = match.groups()
    what = re.search(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"', rest)
    if kind != "recv" or not what:
        return None
    slices = len(what[1].split(","))
    base = what[2].lower().replace("_", "-")
    return Operation(name, base, times, 0, _sizes(result)[:1], (), "", "", slices, devices, begun=True)


def _moved(match: re.Match, times: float) -> Operation | None:
    """What is moved between the device and its host, whose memory a TPU's compiler calls S(5)."""
    name, result, kind, _ = match.groups()
    if "S(5)" not in result or kind not in ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start"):
        return None
    arrays = re.findall(r"\b[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?", result)
    here = max((_sizes(array) for array in arrays if "S(5)" not in array), key=lambda sizes: _bytes(sizes[0]))
    out = kind == "dynamic-update-slice-start" or (kind == "copy-start" and "S(5)" in arrays[0])
    return Operation(name, HOST[not out], times, 0, here, (), "", "", begun=True)


def _evenly(op: Operation, rest: str, lines: list[str]) -> Operation:
    """What a ragged exchange sends where all get as much: the smaller of what goes in and comes out, of which the other
    has room for the most that there may be.
    """
    operand = (re.match(r"%?([\w.-]+)", rest) or [""])[0].lstrip("%")
    given = next((m[2] for m in map(_INSTRUCTION.match, lines) if m and m[1] == operand), "")
    return dataclasses.replace(
        op, sizes=min(op.sizes, _sizes(given)[:1] or op.sizes, key=lambda s: sum(map(_bytes, s)))
    )


def _own(op: Operation, lines: list[str]) -> Operation:
    """A product of all rows with each expert that skips those of others, by a mask of experts and rows."""
    given = (_sizes(m[2]) for m in map(_INSTRUCTION.match, lines) if m and m[3] == "parameter")
    mask = next((shape for ((dtype, shape),) in given if dtype == "pred"), (1, 0))
    return dataclasses.replace(op, times=op.times / mask[0], rows=mask[-1])


def _filled(operations: list[Operation]) -> list[Operation]:
    """Products by expert with the rows that come where all experts get as much, if there is room for more."""
    sent = min((op.sizes[0][1][0] for op in operations if op.kind == "ragged-all-to-all"), default=math.inf)
    less = lambda op: dict(rows=sent) | ({} if op.tiling else dict(times=op.times * sent / op.rows))  # noqa: E731
    return [dataclasses.replace(op, **less(op)) if op.rows > sent else op for op in operations]


def _sizes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = _SHAPE.findall(text)
    return tuple((dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, an attribute with line breaks in it made one line, and the entry's name."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            lines = found.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            lines.append(line)
        elif lines and line.strip() != "}":
            lines[-1] += " " + line
    return found, entry


def _trips(computations: dict[str, list[str]], condition: str, loop: str, unknown: int = 1) -> int:
    """How often a counted loop runs: the bound that its condition compares with; `unknown` where it tells none."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    if known:
        return int(known[1])
    bounds = [re.search(r" [su]32\[\]\S* constant\((\d+)\)", line) for line in computations.get(condition, ())]
    return next((int(bound[1]) for bound in bounds if bound), unknown)


def _group(rest: str) -> tuple[int, int]:
    """How many devices a collective joins, and how far neighbours are apart in the mesh.

    replica_groups={{0,4},{1,5},...}                                                    2, 4
    replica_groups=[4,2]<=[2,4]T(1,0)                                                   2, 4
    replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}                               2, 4
    replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}     2, 4
    """
    iota = re.search(r"(?:device_ids=\(|<=)\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
        ids = (_iota(iota) if iota else np.arange(math.prod(sizes.values()))).reshape(*sizes.values())
        first = np.moveaxis(ids, used, range(-len(used), 0)).reshape(-1, math.prod(ids.shape[at] for at in used))[0]
    elif listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        first = np.asarray([int(n) for n in listed[1].split(",")])
    elif iota and (groups := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)):
        first = _iota(iota).reshape(int(groups[1]), int(groups[2]))[0]
    else:
        return 1, 1
    return len(first), int(abs(first[1] - first[0])) if len(first) > 1 else 1


def _iota(found: re.Match) -> np.ndarray:
    """Devices in the order of [2,4]T(1,0): 0 to 7 as rows of 4, transposed."""
    sizes = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids


class _Places:
    """Where in the source an operation comes from, by the tables in front of the program."""

    def __init__(self, text: str):
        table = lambda name, row: dict(re.findall(row, _section(text, name), re.MULTILINE))  # noqa: E731
        self.files = table("FileNames", r'^(\d+) "(.*)"$')
        self.locations = {
            number: (file, line)
            for number, file, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _section(text, "FileLocations"), re.MULTILINE
            )
        }
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _section(text, "StackFrames"), re.MULTILINE
        )
        self.frames = {number: (location, parent) for number, location, parent in frames}

    def of(self, frame: int) -> str:
        """The innermost line of jaxlm's own on the stack that is no `dense` of all, else the innermost one."""
        number, first = frame, ""
        while str(number) in self.frames:
            location, parent = self.frames[str(number)]
            file, line = self.locations.get(location, ("", "0"))
            place = _short(self.files.get(file, "?"), line)
            first = first or place
            if place.startswith("jaxlm/") and not place.startswith(HELPERS):
                return place
            number = int(parent or 0) - 1  # they count from 1, the outermost having itself
        return first

    def written(self, rest: str) -> str:
        """The same of a program that writes places into each line."""
        found = re.search(r'source_file="([^"]*)" source_line=(\d+)', rest)
        return _short(found[1], found[2]) if found else ""


def _short(file: str, line: str) -> str:
    _, mark, tail = file.rpartition("/jaxlm/")
    return f"jaxlm/{tail}:{line}" if mark else f"{file.rpartition('/')[2]}:{line}"


def _section(text: str, name: str) -> str:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    return found[1] if found else ""
