"""Mixing: which source gives each row of the stream, as a pure function of the row's index, found in O(log).

    sizes = {"docs": 4, "code": 100}                           rows of each source in one epoch
    mix = plan(sizes, sizes.get, weights={"docs": 2, "code": 1}, epochs={"docs": 1})
    [mix[i] for i in range(7)]          code 0, docs 0, docs 1, code 1, docs 2, docs 3, code 2
    mix[10**9]                          ("code", 999999996): docs has been read once, and its share is code's now

Without weights a source has the share of its size, min(size, cap) ** (1 / temperature): with temperature 1 and a cap,
T5's examples-proportional mixing (arXiv:1910.10683, 3.5.2); mT5 and multilingual BERT take temperatures of 3.3 and 1.4.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import sys
from typing import Any, NamedTuple

from jaxlm.lookup import Mistake, miss

Weights = Mapping[str, float]


class Stretch(NamedTuple):
    """Rows from `start` on, for as long as the same sources take turns in the same proportions."""

    start: int
    parts: tuple[int, ...]  # of each source; 0: none of these rows
    before: tuple[int, ...]  # how many of the rows before `start` were each source's


class Mixture:
    """`self[row]` is (source, how many of that source's rows came before)."""

    def __init__(self, names: Sequence[str], stretches: Sequence[Stretch]):
        self.names, self.stretches = names, stretches
        self._starts = [stretch.start for stretch in stretches]

    def __getitem__(self, row: int) -> tuple[str, int]:
        start, parts, before = self.stretches[bisect_right(self._starts, row) - 1]
        now, then = _taken(parts, row - start), _taken(parts, row - start + 1)
        source = next(i for i, count in enumerate(now) if then[i] != count)
        return self.names[source], before[source] + now[source]


def plan(
    sources: Iterable[str],
    size: Callable[[str], int],
    *,
    weights: Weights | None = None,
    temperature: float | None = None,
    cap: float | None = None,
    epochs: float | Weights | None = None,
    schedule: Sequence[tuple[int, Weights]] | None = None,
    batch: int | None = None,
    until: int = sys.maxsize,
) -> Mixture:
    """Mix `sources`, of which one epoch has `size(source)` rows (asked only of those that have a share).

    The shares (to within 1 %) are kept in any stretch of rows: `weights`; or a `schedule` of them, [(step, weights),
    ...] from step 0 on, in batches of `batch` rows; or else the sources' sizes, of which rows beyond `cap` do not
    count, to the power 1 / `temperature`. `epochs` bounds how often a source is read, one number or one by source:
    after that its share goes to the others. Raises `Mistake` for values that are none of this, and when no source is
    left before row `until`.
    """
    sources = list(sources)
    if sum(x is not None for x in (weights, schedule, temperature)) > 1 or (cap is not None and (weights or schedule)):
        raise Mistake("data: the shares come from weights, or a schedule of them, or the sizes (temperature, cap); one")
    if schedule is not None:
        phases = [(step * (batch or 1), weights) for step, weights in _checked_schedule(schedule, sources)]
    elif weights is not None:
        phases = [(0, _checked("data.weights", weights, sources))]
    else:
        phases = [(0, _by_size({source: size(source) for source in sources}, temperature, cap))]
    names = sorted({source for _, weights in phases for source, weight in weights.items() if weight})
    bounds = _bounds(epochs, sources)
    rooms = [math.floor(bounds[name] * size(name)) if name in bounds else sys.maxsize for name in names]
    shares = [(start, [float(weights.get(name, 0.0)) for name in names]) for start, weights in phases]
    return Mixture(names, _stretches(shares, rooms, until, batch))


def _stretches(
    phases: Sequence[tuple[int, list[float]]], rooms: Sequence[int], until: int, batch: int | None
) -> list[Stretch]:
    """Cut the phases where a source has been read as often as it may be; `rooms` are the rows that each may give."""
    found: list[Stretch] = []
    before = [0] * len(rooms)
    for (start, shares), end in zip(phases, [start for start, _ in phases[1:]] + [sys.maxsize]):
        while start < end:
            left = [share if room > count else 0.0 for share, room, count in zip(shares, rooms, before)]
            if not any(left):
                if start >= until:  # nobody will ask for these rows
                    return found
                steps = f", {start // batch:,} steps" if batch else ""
                raise Mistake(
                    f"data.epochs: after {start:,} rows{steps} no source is left, and the run asks for more; raise the "
                    "bounds, or leave a source without one"
                )
            parts = _whole(left)
            found.append(Stretch(start, parts, tuple(before)))
            rows = _rows_within(parts, [room - count for room, count in zip(rooms, before)], end - start)
            before = [count + taken for count, taken in zip(before, _taken(parts, rows))]
            start += rows
    return found


def _rows_within(parts: Sequence[int], rooms: Sequence[int], most: int) -> int:
    """The largest number of rows, up to `most`, of which no source has to give more than it has."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if all(taken <= room for taken, room in zip(_taken(parts, middle), rooms)):
            low = middle
        else:
            high = middle - 1
    return low


def _taken(parts: Sequence[int], rows: int) -> list[int]:
    """How many of the first `rows` rows are each source's: the first has its share of all, the next of what is left."""
    rest, taken = sum(parts), []
    for part in parts:
        later = rows * (rest - part) // rest if part else rows
        taken.append(rows - later)
        rows, rest = later, rest - part
    return taken


def _whole(shares: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in these proportions, to within 1 %."""
    scale = 100 / min(share for share in shares if share)
    return tuple(int(share * scale) for share in shares)


def _by_size(sizes: Mapping[str, int], temperature: float | None, cap: float | None) -> dict[str, float]:
    for name, value in dict(temperature=temperature, cap=cap).items():
        if value is not None and not (_is_number(value) and value > 0):
            raise Mistake(f"data.{name} is a number above 0, not {value!r}")
    power = 1 / (temperature or 1.0)
    try:
        return {source: min(size, cap or size) ** power for source, size in sizes.items()}
    except OverflowError:
        raise Mistake(
            f"data.temperature={temperature} is too near to 0; name the largest source in data.weights"
        ) from None


def _bounds(epochs: object, sources: Sequence[str]) -> dict[str, float]:
    bounds: Any = dict.fromkeys(sources, epochs) if _is_number(epochs) else {} if epochs is None else epochs
    if not isinstance(bounds, Mapping):
        raise Mistake(f"data.epochs is a number, or one by source, not {epochs!r}")
    for source, bound in bounds.items():
        if source not in sources:
            raise miss("data.epochs: the store", source, sources)
        if not _is_number(bound) or not 0 < bound < math.inf:
            raise Mistake(f"data.epochs: {source} has {bound!r}; how often a source may be read is a number above 0")
    return dict(bounds)


def _checked_schedule(schedule: object, sources: Sequence[str]) -> list[tuple[int, Weights]]:
    """A schedule as it is, or a `Mistake`."""
    form = "data.schedule is a list like [(0, {'docs': 1.0}), (1000, {'docs': 1.0, 'code': 2.0})]"
    if not isinstance(schedule, Sequence) or not schedule or not all(_is_pair(entry) for entry in schedule):
        raise Mistake(f"{form}, not {schedule!r}")
    steps = [step for step, _ in schedule]
    if steps[0] != 0 or any(later <= sooner for sooner, later in zip(steps, steps[1:])):
        raise Mistake(f"{form}: its steps begin at 0 and rise; these are {steps}")
    return [(step, _checked(f"data.schedule from step {step}", weights, sources)) for step, weights in schedule]


def _is_pair(entry: object) -> bool:
    return isinstance(entry, Sequence) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], Mapping)


def _checked(what: str, weights: Weights, sources: Sequence[str]) -> Weights:
    """Weights as they are, or a `Mistake`."""
    if not isinstance(weights, Mapping):
        raise Mistake(f"{what} is a number for each source, as in {{{sources[0]!r}: 1.0}}, not {weights!r}")
    for source, weight in weights.items():
        if source not in sources:
            raise miss(f"{what}: the store", source, sources)
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise Mistake(f"{what}: {source} has {weight!r}; a weight is a number from 0 up")
    if not any(weights.values()):
        raise Mistake(f"{what}: {dict(weights)} has no positive weight; sources: {', '.join(sources)}")
    return weights


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
