"""Tell the story of a run on one page: `report.html`, complete in itself, opens without a network.

    python -m jaxlm.report WORKDIR

    metrics.jsonl    {"step": 10, "loss": 5.1, "lr": 1e-3, "grad_norm": 1, "tokens_per_s": 9e3, "skipped": 0, "time": 3}
                     {"step": 500, "eval": "docs", "loss": 2.3, "perplexity": 9.9, "bits_per_byte": 1.95}
    samples.jsonl    {"step": 500, "prompt": "The list", "text": " of names"}
    summary.json     {"validation_bits_per_byte": 1.85, "xz_bits_per_byte": 2.4, "parameters": 2000000}
    config.json      the config that was trained
    command          the line that started it

Only the folder must exist. `skipped` counts the steps skipped so far, `time` the seconds of all sittings; any
other number in a training line gets a chart of its own. Read `write` first; the look is `report.html.jinja`.
"""

from collections.abc import Iterator
import json
import math
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from jaxlm import charts, program
from jaxlm.charts import Curve
from jaxlm.lookup import Mistake

CHARTS = {  # a key of a training line -> title, unit, y axis; a key not named here is drawn under its own name
    "lr": ("Learning rate", "", "linear"),
    "grad_norm": ("Gradient norm", "before clipping", "log"),
    "tokens_per_s": ("Throughput", "tokens a second", "zero"),
    "accuracy": ("Accuracy", "share of tokens predicted", "linear"),
}
TOLD = {
    "step",
    "loss",
    "skipped",
    "in_row",
    "tokens",
    "time",
    "wait_s",
    "wait_share",
    "slowest_host",
    "behind_s",
}  # keys of a training line that the page tells in another way
BASELINES = {
    "validation_bits_per_byte": "this model",
    "ngram_bits_per_byte": "5-gram, Kneser-Ney",
    "bigram_bits_per_byte": "2-gram, Kneser-Ney",
    "xz_bits_per_byte": "xz -9e",
}


class Run(NamedTuple):
    """What a workdir holds, in the order of the steps: training lines, evaluations by name, samples."""

    name: str
    workdir: str
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    command: str
    unread: int


def write(workdir: str) -> str:
    """Write WORKDIR/report.html from what the run has left so far, and return its path.

    A missing file or a line cut by a kill is no error; raises `Mistake` when there is no such folder.
    """
    page = _page(_read(workdir))
    path = epath.Path(workdir) / "report.html"
    fresh = path.with_name("report.html.new")
    fresh.write_bytes(page.encode("utf-8", "replace"))  # a sample may hold half a surrogate pair
    fresh.replace(path)
    return str(path)


def _read(workdir: str) -> Run:
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise Mistake(f"{workdir!r} is no folder; `jaxlm report` takes the workdir of a run")
    metrics, unread_metrics = _lines(folder / "metrics.jsonl")
    samples, unread_samples = _lines(folder / "samples.jsonl")
    train: dict[float, dict] = {}
    evals: dict[str, dict[float, dict]] = {}
    for row in metrics:  # a resumed run repeats the steps after its checkpoint: the later line stands
        step = _number(row.get("step"))
        if not math.isnan(step):
            (evals.setdefault(str(row["eval"]), {}) if "eval" in row else train)[step] = row
    command = folder / "command"
    return Run(
        name=folder.name,
        workdir=str(workdir),
        train=[train[step] for step in sorted(train)],
        evals={name: [rows[step] for step in sorted(rows)] for name, rows in sorted(evals.items())},
        samples=samples,
        summary=read_object(folder / "summary.json"),
        config=read_object(folder / "config.json"),
        command=command.read_bytes().decode(errors="replace").strip() if command.exists() else "",
        unread=unread_metrics + unread_samples,
    )


def _lines(path: epath.Path) -> tuple[list[dict], int]:
    """The JSON objects in a file, one a line, and how many lines hold none."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()] if path.exists() else []
    rows = [row for row in map(_json, lines) if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def read_object(path: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file; nothing where it is missing or damaged."""
    path = epath.Path(path)
    value = _json(path.read_bytes()) if path.exists() else None
    return value if isinstance(value, dict) else {}


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """A finite float that can be drawn; not-a-number for everything else (null, "NaN", a list, 1e300)."""
    try:
        number = float("nan" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 1e30 else math.nan


def _values(rows: list[dict], key: str) -> np.ndarray:
    return np.array([_number(row.get(key)) for row in rows], np.float64)


def _known(rows: list[dict], key: str) -> np.ndarray:
    values = _values(rows, key)
    return values[np.isfinite(values)]


# What the page shows. Nothing here escapes anything: the template does, for all but the drawings.


def _page(run: Run) -> str:
    """The whole page."""
    model = run.config.get("model")
    bars, facts = _bars(run.summary)
    return charts.page(
        "report.html.jinja",
        run=run,
        model=model["name"] if isinstance(model, dict) and "name" in model else "language model",
        tiles=_tiles(run),
        loss=_loss(run),
        bars=bars,
        facts=facts,
        panels=_panels(run),
        evaluations=_evaluations(run.evals),
        samples=_samples(run.samples),
        commands=_commands(run),
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    )


def _tiles(run: Run) -> Iterator[tuple[str, str]]:
    """The headline numbers, each with what it is."""
    for name, rows in run.evals.items():
        for key in ("bits_per_byte", "perplexity", "loss"):
            if len(values := _known(rows, key)):
                yield f"{values[-1]:.3f}", f"{_words(key)}, {name}"
                break
    if len(loss := _known(run.train, "loss")):
        yield f"{loss[-max(1, len(loss) // 50) :].mean():.3f}", "training loss, nats a token"
    if len(steps := _known(run.train, "step")):
        planned = _number(run.config.get("steps"))
        yield f"{steps[-1]:,.0f}", f"of {planned:,.0f} steps" if planned > steps[-1] else "steps"
    if len(speed := _known(run.train, "tokens_per_s")):
        yield charts.number(float(np.median(speed))), "tokens a second"
    if len(times := _known(run.train, "time")):
        yield _duration(times[-1]), "of training"
    if not math.isnan(size := _number(run.summary.get("parameters"))):
        yield charts.number(size), "parameters"


def _loss(run: Run) -> dict[str, Any] | None:
    """Training and validation loss in one chart, drawn for a wide and for a narrow page; None before the first step."""
    lines = [("training", run.train)] + [(f"validation, {name}", rows) for name, rows in run.evals.items()]
    lines = [(name, rows) for name, rows in lines if len(_known(rows, "loss"))]
    if not lines:
        return None
    curves = [Curve(_values(rows, "step"), _values(rows, "loss"), smooth=rows is run.train) for _, rows in lines]
    ends = [(name, _known(rows, "loss")) for name, rows in lines]
    alt = "Loss by step. " + "; ".join(f"{name}: from {known[0]:.2f} to {known[-1]:.2f}" for name, known in ends)
    return {
        "legend": [(name, charts.color(i)) for i, (name, _) in enumerate(lines)],
        "wide": charts.draw(curves, scale="log", size=(9.2, 3.5), name="wide", alt=alt),
        "narrow": charts.draw(curves, scale="log", size=(4.4, 3.2), name="narrow", alt=alt),
    }


def _panels(run: Run) -> list[dict[str, Any]]:
    """A small chart for each number that the training lines hold, those in CHARTS first."""
    found = {key for row in run.train for key in row if len(_known([row], key))} - TOLD
    steps, panels = _values(run.train, "step"), []
    for key in [key for key in CHARTS if key in found] + sorted(found - set(CHARTS)):
        title, note, scale = CHARTS.get(key, (_words(key).capitalize(), "", "linear"))
        marks = np.empty(0)
        if key == "grad_norm" and len(skipped := _known(run.train, "skipped")):
            marks = steps[np.diff(np.nan_to_num(_values(run.train, "skipped")), prepend=0) > 0]
            note += f"; {skipped.max():,.0f} steps skipped" + (" (marked)" if len(marks) else "")
        if key == "tokens_per_s" and len(shares := _known(run.train, "wait_share")):
            note += f"; {np.mean(shares):.1%} of the time waiting for data"
            note += _slowest(run.train)
        known = _known(run.train, key)
        alt = f"{title} by step: from {charts.number(known[0])} to {charts.number(known[-1])}"
        curve = Curve(steps, _values(run.train, key), smooth=key != "lr")
        svg = charts.draw([curve], scale=scale, size=(4.4, 2.3), name=f"panel{len(panels)}", alt=alt, marks=marks)
        panels.append({"title": title, "note": note, "svg": svg})
    return panels


def _slowest(rows: list[dict]) -> str:
    """Which host was later than the others most of the time, and by how much; "" where there was one host."""
    hosts, behind = _values(rows, "slowest_host"), _values(rows, "behind_s")
    names, counts = np.unique(hosts[np.isfinite(hosts) & np.isfinite(behind)], return_counts=True)
    if not len(names):
        return ""
    most = names[counts.argmax()]
    share, mean = counts.max() / counts.sum(), behind[hosts == most].mean()
    return f"; host {most:.0f} the slowest in {share:.0%} of the lines, {mean:.3f} s a step behind the median"


def _bars(summary: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Bits per byte beside the baselines, best first, and what else summary.json says."""
    found = sorted((value, key) for key in BASELINES if not math.isnan(value := _number(summary.get(key))))
    if len(found) < 2:
        return [], [(_words(key), _figure(key, value)) for key, value in summary.items()]
    top = max(found[-1][0], 1e-9)
    bars = [
        {
            "name": BASELINES[key],
            "value": f"{value:.3f}",
            "percent": round(100 * max(value / top, 0), 1),
            "ours": key.startswith("validation"),
        }
        for value, key in found
    ]
    return bars, [(_words(key), _figure(key, value)) for key, value in summary.items() if key not in BASELINES]


def _evaluations(evals: dict[str, list[dict]]) -> dict[str, Any]:
    """A table: the newest and the best (by loss) evaluation of each validation set."""
    every = [row for rows in evals.values() for row in rows]
    keys = list(dict.fromkeys(key for row in every for key in row if len(_known([row], key)) and key != "time"))
    table = []
    for name, rows in evals.items():
        losses = _values(rows, "loss")
        best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else len(rows) - 1
        newest = (
            [(name, rows[-1])]
            if best == len(rows) - 1
            else [(f"{name}, newest", rows[-1]), (f"{name}, best", rows[best])]
        )
        table += [(label, [_figure(key, row.get(key)) for key in keys]) for label, row in newest]
    return {"head": [_words(key) for key in keys], "rows": table}


def _samples(samples: list[dict]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(step, its (prompt, continuation) pairs), newest first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in samples:
        step, prompt = _number(row.get("step")), str(row.get("prompt") or "")
        title = "Samples" if math.isnan(step) else f"After step {step:,.0f}"
        groups.setdefault(title, []).append((prompt, str(row.get("text") or "").removeprefix(prompt)))
    return list(groups.items())[::-1]


def _commands(run: Run) -> list[tuple[str, str]]:
    return [
        (
            "Train on: the same command resumes from the newest checkpoint",
            run.command or f"jaxlm train --config=CONFIG --workdir={run.workdir}",
        ),
        ("Let it write", f"jaxlm generate --workdir={run.workdir}"),
        ("Measure it", f"jaxlm evaluate --workdir={run.workdir}"),
    ]


def _figure(key: str, value: Any) -> str:
    number = _number(value)
    if math.isnan(number):
        return "\N{EN DASH}" if value is None else str(value)
    if key.endswith("seconds"):
        return _duration(number)
    return f"{number:,.0f}" if number == round(number) or abs(number) >= 1e3 else f"{number:.4g}"


def _words(key: str) -> str:
    return key.replace("_seconds", "_time").replace("_", " ")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def main(argv: list[str]) -> None:
    """Write the report of the one folder in `argv` and print its path."""
    if argv in (["-h"], ["--help"]):
        print((__doc__ or "").strip())
    elif len(argv) == 1:
        print(write(argv[0]))
    else:
        raise Mistake(f"one folder, please, not {len(argv)}: jaxlm report WORKDIR")


if __name__ == "__main__":
    program.run("report", main)
