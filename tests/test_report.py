"""The report tells the truth about any run, however cut short or hostile its files are."""

from html.parser import HTMLParser
import json
import math
from pathlib import Path
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm import charts, report
from jaxlm.lookup import Mistake

HOSTILE = (
    "</blockquote><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \ud800 \x00 \u202e {{ 7 * 7 }} $x$\\1"
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: the tags in order, their attributes, the text; refuses tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def lines(steps=range(10, 210, 10), **more):
    return [
        {
            "step": s,
            "loss": 8 / s**0.3,
            "grad_norm": 1.5,
            "lr": 1e-3,
            "tokens_per_s": 12e3,
            "skipped": 0,
            "time": s / 10,
        }
        | more
        for s in steps
    ]


def fill(folder, metrics=(), samples=(), tail="", **objects):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + tail)
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    for name, value in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def written(folder):
    return Path(report.write(str(folder))).read_text("utf-8")


def curves(html):
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


def test_a_whole_run_is_told(tmp_path):
    evals = [
        {"step": s, "eval": "docs", "loss": 2.5 - s / 1e3, "perplexity": 9.0, "bits_per_byte": 1.9 - s / 1e3}
        for s in (100, 200)
    ]
    summary = {
        "validation_bits_per_byte": 1.7,
        "bigram_bits_per_byte": 2.08,
        "xz_bits_per_byte": 2.4,
        "train_seconds": 252.0,
        "parameters": 2_213_120,
    }
    samples = [{"step": 200, "prompt": "The list", "text": " of names"}]
    fill(
        tmp_path / "run",
        [*lines(), *evals],
        samples,
        summary=summary,
        config={"steps": 200, "model": {"name": "llama"}},
    )
    (tmp_path / "run" / "command").write_text("jaxlm train --config=a.py --workdir=run\n")
    page = Page(written(tmp_path / "run"))
    for promised in (
        "1.700",
        "of names",
        "4 min 12 s",
        "2.2M",
        "2-gram",
        "xz -9e",
        "jaxlm train --config=a.py",
        '"name": "llama"',
        "Learning rate",
        "Throughput",
    ):
        assert promised in page.text, promised
    assert page.tags.count("svg") == 2 + 3, "loss, wide and narrow, then learning rate, gradient norm, throughput"
    assert "5-gram" not in page.text, "a baseline that was not measured is not shown"


@pytest.mark.parametrize(
    "metrics", [[], lines([1]), [{"step": 1, "eval": "docs", "loss": 2.0}], [{"step": 1}], [{"loss": 1.0}]]
)
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, metrics):
    page = Page(written(fill(tmp_path / "run", metrics)))
    assert ("No step has been logged yet" in page.text) == (not any({"step", "loss"} <= row.keys() for row in metrics))


def test_an_empty_folder_has_a_report_and_a_missing_one_is_a_mistake(tmp_path):
    assert "No step has been logged yet" in written(tmp_path)
    with pytest.raises(Mistake, match="nowhere"):
        report.write(str(tmp_path / "nowhere"))


def test_a_line_cut_by_a_kill_is_left_out_and_counted(tmp_path):
    page = Page(written(fill(tmp_path / "run", lines(range(10, 40, 10)), tail='{"step": 40, "lo')))
    assert "Left out: 1 unreadable line " in page.text
    assert "steps30tokens" in re.sub(r"\s", "", page.text), "step 40 was never measured"


def test_a_resumed_run_is_not_drawn_twice(tmp_path):
    straight = written(fill(tmp_path / "a", lines()))
    resumed = written(fill(tmp_path / "b", [*lines(range(10, 160, 10), loss=9.0), *lines(range(10, 210, 10))]))
    assert curves(straight) == curves(resumed)


def test_hostile_text_stays_text(tmp_path):
    metrics = [*lines(**{HOSTILE: 1.0}), {"step": 10, "eval": HOSTILE, "loss": 2.0, HOSTILE: 3.0}]
    samples = [{"step": 10, "prompt": HOSTILE, "text": HOSTILE}, {"step": HOSTILE, "text": [HOSTILE]}]
    config = {"model": {"name": HOSTILE}, HOSTILE: HOSTILE}
    page = Page(
        written(
            fill(
                tmp_path / "run", metrics, samples, summary={HOSTILE: HOSTILE, "train_seconds": HOSTILE}, config=config
            )
        )
    )
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 6, "shown as it is, in samples, config, summary and names"


def test_the_page_opens_without_a_network(tmp_path):
    html = written(fill(tmp_path / "run", lines(), config={"steps": 1}))
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html
    assert all(value.startswith("#") for name, value in Page(html).attributes if name in ("href", "src", "xlink:href"))
    assert "default-src 'none'" in html, "and the browser is told to fetch nothing"


def test_every_reference_in_the_page_has_its_one_target(tmp_path):
    html = written(fill(tmp_path / "run", lines(skipped=3)))
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) == set(ids)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    folder = fill(tmp_path / "run", lines())
    assert written(folder) == written(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "report.html"], "nothing half-written is left"


@pytest.mark.parametrize("bad", [math.nan, None, "-Infinity", 1e300], ids=str)
def test_a_value_that_is_no_number_is_a_hole_in_the_curve(tmp_path, bad):
    metrics = lines()
    metrics[5] |= {"loss": bad, "grad_norm": bad, "skipped": bad, "time": bad}
    page = Page(written(fill(tmp_path / "run", metrics)))
    assert page.tags.count("svg") == 5
    assert not {"nan", "inf", "-inf"} & set(re.findall(r"[\w-]+", page.text.lower()))


@pytest.mark.parametrize("bad", ["x", [1], {"a": 1}, True, math.inf, 10**400, -1e300], ids=lambda v: str(v)[:9])
def test_only_a_finite_number_counts_as_one(bad):
    assert math.isnan(report._number(bad)) and report._number("2.5") == 2.5


def test_skipped_steps_are_counted_and_marked(tmp_path):
    metrics = lines(range(10, 60, 10)) + lines(range(60, 110, 10), skipped=2) + lines(range(110, 210, 10), skipped=3)
    html = written(fill(tmp_path / "run", metrics))
    assert "3 steps skipped (marked)" in html
    loss_wide, loss_narrow, rate, norm, speed = curves(html)
    assert len(re.findall(r"<use [^>]*var\(--c3\)", norm)) == 2, "where the count grew: at steps 60 and 110"
    assert "var(--c3)" not in loss_wide + loss_narrow + rate + speed


def test_a_new_number_in_the_log_gets_a_chart_without_new_code(tmp_path):
    assert "Expert balance" in written(fill(tmp_path / "run", lines(expert_balance=0.5)))


def test_a_long_run_keeps_its_extremes_in_few_points():
    values = np.ones(100_000)
    values[77_777] = 50.0
    steps, mean, low, high = charts._thin(np.arange(100_000.0), values)
    assert len(steps) <= charts.POINTS and high.max() == 50.0 and low.min() == 1.0
    assert steps[-1] == 99_999 and np.all(np.diff(steps) > 0)
    assert mean[steps.searchsorted(77_777)] == pytest.approx(1 + 49 / 125)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=300))
def test_smoothing_stays_within_the_values_and_keeps_the_holes(values):
    values = np.array(values)
    smooth = charts._smooth(values)
    known = np.isfinite(values)
    assert np.array_equal(np.isfinite(smooth), known)
    if known.any():
        assert smooth[known].min() >= values[known].min() - 1e-9 and smooth[known].max() <= values[known].max() + 1e-9


def test_a_constant_is_smoothed_to_itself_up_to_both_ends():
    assert np.allclose(charts._smooth(np.full(400, 3.0)), 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1500, "1,500"),
        (3403.6, "3,404"),
        (12_300, "12.3k"),
        (2e6, "2M"),
        (3e-4, "0.0003"),
        (-0.25, "\N{MINUS SIGN}0.25"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert charts.number(value) == text


def test_the_program_prints_where_the_report_is(tmp_path, capsys):
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    with pytest.raises(Mistake, match="one folder"):
        report.main([])


def test_the_host_that_the_others_waited_for_is_named_beside_the_throughput(tmp_path):
    rows = lines(wait_share=0.1, slowest_host=3, behind_s=0.25)
    rows[0] |= {"slowest_host": 1, "behind_s": 0.01}
    text = Page(written(fill(tmp_path / "run", rows))).text
    assert "10.0% of the time waiting for data; host 3 the slowest in 95% of the lines, 0.250 s a step behind" in text
    assert "Slowest host" not in text, "a number of a host is no curve"
