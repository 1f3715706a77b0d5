"""Tell the story of a run on one page: `report.html`, complete in itself, opens without a network.

    WORKDIR/metrics.jsonl    {"step": 10, "loss": 5.1, "lr": 0.001, "grad_norm": 1.2, "tokens_per_s": 12000.0, "skipped": 0, "time": 3.2}
                             {"step": 500, "eval": "docs", "loss": 2.3, "perplexity": 9.9, "bits_per_byte": 1.95}
    WORKDIR/samples.jsonl    {"step": 500, "prompt": "The list", "text": " of names ..."}           where there are samples
    WORKDIR/summary.json     {"validation_bits_per_byte": 1.85, "bigram_bits_per_byte": 2.08, ...}  where there are baselines
    WORKDIR/config.json, WORKDIR/command                                                            what was run, and how

    python -m jaxlm.report WORKDIR

`skipped` counts the steps skipped so far, `time` the seconds since the program started. Any other number in a training line gets
a chart of its own. Read `write` first, then `_page`; the look of it is `report.css`.
"""

from collections.abc import Iterable
from html import escape
import io
import json
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

from etils import epath
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
import numpy as np

from jaxlm import config as configs
from jaxlm.lookup import Mistake

POINTS = 800  # a curve has no more; above it, neighbours share a point and the band shows their range
INK, MUTED, GRID = "#000001", "#000002", "#000003"  # stand-ins: the page puts var(--c1) ... there, so that charts follow the theme
SERIES = ["#000004", "#000005", "#000006", "#000007"]  # training, then each validation set
CHARTS = {  # key -> title, unit, y axis
    "lr": ("Learning rate", "", "linear"),
    "grad_norm": ("Gradient norm", "before clipping", "log"),
    "tokens_per_s": ("Throughput", "tokens per second", "zero"),
    "accuracy": ("Accuracy", "share of tokens predicted", "linear"),
}
QUIET = {"step", "loss", "time", "skipped", "wait_s"}  # training keys told elsewhere on the page
NAMES = {"xz_bits_per_byte": "xz -9e", "bigram_bits_per_byte": "2-gram", "ngram_bits_per_byte": "5-gram", "validation_bits_per_byte": "this model"}


class Run(NamedTuple):
    """What a workdir holds: one training line a step, one evaluation a (name, step), the newest of each."""

    name: str
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    command: str
    unread: int  # lines that are no JSON object: those that a kill cut


def write(workdir: str) -> str:
    """Write WORKDIR/report.html from what the run has left so far, and return its path.

    Half-written lines and missing files are no error; raises `Mistake` when there is no such folder.
    """
    page = _page(_read(workdir)).encode("utf-8", "replace")  # a sample may hold half a surrogate pair
    path = epath.Path(workdir) / "report.html"
    fresh = path.with_name("report.html.new")
    fresh.write_bytes(page)
    fresh.replace(path)
    return str(path)


def _read(workdir: str) -> Run:
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise Mistake(f"{workdir} is no folder; `jaxlm report` takes the workdir of a run")
    metrics, unread = _lines(folder / "metrics.jsonl")
    samples, unread_samples = _lines(folder / "samples.jsonl")
    train: dict[float, dict] = {}
    evals: dict[str, dict[float, dict]] = {}
    for row in metrics:  # a resumed run repeats the steps since its checkpoint: the later line stands
        step = _number(row.get("step"))
        if math.isfinite(step):
            (evals.setdefault(str(row["eval"]), {}) if "eval" in row else train)[step] = row
    command = folder / "command"
    return Run(
        folder.name, [train[s] for s in sorted(train)], {n: [e[s] for s in sorted(e)] for n, e in sorted(evals.items())}, samples,
        _object(folder / "summary.json"), _object(folder / "config.json"), command.read_text().strip() if command.exists() else "",
        unread + unread_samples,
    )  # fmt: skip


def _lines(path: epath.Path) -> tuple[list[dict], int]:
    """The JSON objects of a file, one a line, and how many lines were none."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    rows = [row for row in map(_json, lines) if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def _object(path: epath.Path) -> dict[str, Any]:
    value = _json(path.read_bytes()) if path.exists() else None
    return value if isinstance(value, dict) else {}


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """A float; not-a-number for what is none (null, a list), so that a hole in a file is a hole in a curve."""
    try:
        return float("nan" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _values(rows: list[dict], key: str) -> np.ndarray:
    values = np.array([_number(row.get(key)) for row in rows], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _known(rows: list[dict], key: str) -> np.ndarray:
    """The finite values of a key, in the order of the steps."""
    values = _values(rows, key)
    return values[np.isfinite(values)]


# Curves.


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most POINTS of (step, mean, lowest, highest); a bin without a finite value stays a hole."""
    bins = [b for b in np.array_split(np.arange(len(steps)), min(POINTS, len(steps))) if len(b)]
    rows = [(steps[b[-1]], f.mean(), f.min(), f.max()) if len(f := values[b][np.isfinite(values[b])]) else (steps[b[-1]], *[np.nan] * 3) for b in bins]
    s, mean, low, high = np.array(rows, np.float64).reshape(-1, 4).T
    return s, mean, low, high


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over about 4% of the curve: no lag, holes left out."""
    window = np.ones(2 * (len(values) // 50) + 1)
    known = np.isfinite(values)
    count = np.convolve(known, window, mode="same")
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _curve(ax: Axes, rows: list[dict], key: str, color: str, label: str, *, smooth: bool) -> None:
    steps, mean, low, high = _thin(_values(rows, "step"), _values(rows, key))
    if smooth:
        ax.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0.6)
        mean = _smooth(mean)
    few = np.isfinite(mean).sum() < 25
    ax.plot(steps, mean, color=color, linewidth=1.6, label=label, marker="o" if few and (not smooth or len(mean) == 1) else None, markersize=3)


def _axes(figure: Figure, scale: str, values: np.ndarray) -> Axes:
    """Axes in the house style. `scale`: linear, zero (starts there) or log (where the values span more than a factor of two)."""
    ax = figure.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=5)
    ax.tick_params(axis="x", length=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _text(y)))
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if scale == "log" and low > 0 and high > 2 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 3) if high < 1e3 * low else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _text(y)))
    if scale == "zero" and high > 0:
        ax.set_ylim(0, high * 1.12)
    return ax


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as inline SVG: text stays text, colours follow the page, ids are its own, nothing points elsewhere."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg class="{name.split("-")[0]}" role="img" aria-label="{escape(label)}" {box[0] if box else ""}>', svg, count=1)
    svg = re.sub(r' id="(?!m|p)[^"]*"', "", svg)  # keeps those of markers and clip paths, which are referred to
    svg = re.sub(r'(?<= id="|ref="#|url\(#)', f"{name}-", svg) if False else re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    return re.sub(r"#00000([1-9])", r"var(--c\1)", re.sub(r"\s*\n\s*", " ", svg))
