"""Pages from templates, and curves and bars as inline SVG: text stays text, no links, colours are the page's (`--c1` to
`--c8` in its CSS).

    draw([Curve(steps, losses, smooth=True), Curve(val_steps, val_losses)], scale="log", size=(9, 3), name="a", alt="")

A curve never has more than POINTS points: above it, neighbouring steps share one, and a band shows their range.
"""

from collections.abc import Sequence
from html import escape
import io
import re
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
import numpy as np
from numpy.typing import ArrayLike

POINTS = 800
INK, GRID, WARN = "#000001", "#000002", "#000003"  # stand-ins: `_inline` turns the last digit n into var(--cn)
LINES = ("#000004", "#000005", "#000006", "#000007", "#000008")
STYLE = {
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxlm",  # the same run, the same bytes
    "xtick.color": INK,
    "ytick.color": INK,
}


class Curve(NamedTuple):
    """Values over steps, not-a-number where there is none; `smooth` draws a running mean over the raw ones."""

    steps: np.ndarray
    values: np.ndarray
    smooth: bool = False


def page(template: str, **values: Any) -> str:
    """A page from a template of this package, which escapes all that it is not told is safe."""
    loader = jinja2.PackageLoader("jaxlm", "")
    known = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return known.get_template(template).render(**values)


def draw(
    curves: Sequence[Curve], *, scale: str, size: tuple[float, float], name: str, alt: str, marks: ArrayLike = ()
) -> str:
    """The curves as one `<svg>`, `size` inches wide and high; `marks` are steps to flag on the x axis.

    `scale`: linear, zero (the y axis starts there), or log (used where the values span more than a factor of two).
    `name` sets the ids apart from those of the page's other charts; `alt` says in words what the picture shows.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # the stub wants literal keys
        figure = Figure(figsize=size)
        width, height = size
        ax = figure.add_axes((0.46 / width, 0.42 / height, 1 - 0.6 / width, 1 - 0.5 / height))
        _axes(ax, scale, np.concatenate([c.values[np.isfinite(c.values)] for c in curves]))
        for i, curve in enumerate(curves):
            _line(ax, curve, LINES[i % len(LINES)])
        if np.size(marks):
            foot = ax.get_xaxis_transform()  # x in steps, y from the bottom of the axes
            ax.plot(marks, np.zeros(np.size(marks)), "^", color=WARN, markersize=5, clip_on=False, transform=foot)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, alt)


def histogram(
    edges: np.ndarray, counts: np.ndarray, *, size: tuple[float, float], name: str, alt: str, label: str
) -> str:
    """Counts [n] between edges [n + 1], which stand at equal distances, as one `<svg>`; `label` says what is counted.

    The rest is as in `draw`.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size)
        width, height = size
        ax = figure.add_axes((0.46 / width, 0.42 / height, 1 - 0.6 / width, 1 - 0.5 / height))
        places = np.arange(len(counts) + 1)
        _axes(ax, "zero", counts, label)
        ax.bar(places[:-1], counts, width=0.86, align="edge", color=LINES[0])
        shown = places[:: max(1, len(places) // 6)]
        ax.set_xticks(shown, [number(float(edges[i])) for i in shown])
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, alt)


def color(i: int) -> str:
    """The CSS colour of the i-th curve of a chart, for its legend."""
    return _themed(LINES[i % len(LINES)])


def number(value: float) -> str:
    """A number as a person writes it: 12.3k, 1,500, 0.0003, 5e-5."""
    if (value == round(value) or abs(value) >= 1e3) and abs(value) < 1e4:
        return f"{value:,.0f}"
    if abs(value) >= 1e4:
        return EngFormatter(sep="", places=None if value % 1e3 == 0 else 1)(value)
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.3g}").replace("e+", "e").replace("-", "\N{MINUS SIGN}")


def _axes(ax: Axes, scale: str, values: np.ndarray, label: str = "step") -> None:
    """No frame, hairlines to read values off, few ticks."""
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0, pad=5)
    ax.tick_params(axis="x", length=3, color=GRID)
    ax.set_xlabel(label, loc="right", labelpad=1)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.01)
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if scale == "log" and low > 0 and high > 2 * low:
        ax.set_yscale("log")
        few, some, many = (1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)
        ax.yaxis.set_major_locator(LogLocator(subs=many if high < 6 * low else some if high < 200 * low else few))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    if scale == "zero" and high > 0:
        ax.set_ylim(0, high * 1.1)
    ax.yaxis.set_major_formatter(EngFormatter(sep="") if high >= 1e4 else FuncFormatter(lambda y, _: number(y)))


def _line(ax: Axes, curve: Curve, color: str) -> None:
    steps, mean, low, high = _thin(curve.steps, curve.values)
    if curve.smooth:
        ax.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0.6)
        mean = _smooth(mean)
    dots = len(mean) < (2 if curve.smooth else 25)
    ax.plot(steps, mean, color=color, linewidth=1.7, marker="o" if dots else None, markersize=3.5)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most POINTS of (step, mean, lowest, highest); a share of the steps without a value stays a hole."""
    share = max(1, -(-len(steps) // POINTS))
    points = []
    for start in range(0, len(steps), share):
        s, v = steps[start : start + share], values[start : start + share]
        v = v[np.isfinite(v)]
        points.append((s[-1], v.mean(), v.min(), v.max()) if len(v) else (s[-1], np.nan, np.nan, np.nan))
    step, mean, low, high = np.array(points, np.float64).reshape(-1, 4).T
    return step, mean, low, high


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over 4% of the curve: no lag, and holes are left out of it."""
    window = np.ones(2 * (len(values) // 50) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.where(known, total / np.maximum(np.convolve(known, window, mode="same"), 1), np.nan)


def _inline(svg: str, name: str, alt: str) -> str:
    """Matplotlib's SVG file as part of a page: scalable, themed, without ids or links of its own."""
    head, _, body = svg.partition("<svg")[2].partition(">")
    box = re.findall(r'viewBox="[\d. ]*"', head)[0]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    shared = set(re.findall(r'(?:href="|url\()#([^")]*)', body))  # markers and clip paths; other ids serve nobody
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in shared else "", body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", body)
    return f'<svg role="img" aria-label="{escape(alt)}" {box}>' + _themed(re.sub(r"\s*\n\s*", " ", body))


def _themed(text: str) -> str:
    return re.sub(r"#00000(\d)", r"var(--c\1)", text)
