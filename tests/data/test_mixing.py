"""Promises of mixing: shares in any stretch, bounds on repetition, weights over steps; all at random access."""

from collections import Counter

import grain
import pytest

from jaxlm.data import mixing
from jaxlm.lookup import Mistake

SIZES = {"chat": 10, "code": 400, "docs": 1600}


def plan(**options):
    return mixing.plan(SIZES, SIZES.__getitem__, **options)


def counts(mix, start, stop):
    return Counter(mix[i][0] for i in range(start, stop))


def test_the_example_of_the_docstring_is_true():
    sizes = {"docs": 4, "code": 100}
    mix = mixing.plan(sizes, sizes.__getitem__, weights={"docs": 2, "code": 1}, epochs={"docs": 1})
    shown = mixing.__doc__.split("range(7)]")[1].split("\n")[0]
    assert shown.strip() == ", ".join(f"{source} {nth}" for source, nth in map(mix.__getitem__, range(7)))
    assert f"{mix[10**9][1]}" in mixing.__doc__


@pytest.mark.parametrize("weights", [{"docs": 5.0, "code": 3.0, "chat": 2.0}, {"docs": 1, "chat": 137.3}])
def test_plain_weights_mix_as_grain_does(weights):
    names = sorted(weights)
    streams = [grain.MapDataset.range(10**9).map(lambda i, name=name: (name, i)) for name in names]
    theirs, ours = grain.MapDataset.mix(streams, [weights[name] for name in names]), plan(weights=weights)
    assert all(ours[i] == theirs[i] for i in (*range(300), *range(10**6, 10**6 + 300)))


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (10, 400, 1600)),
        (dict(temperature=2.0), (10**0.5, 20, 40)),
        (dict(temperature=1e9), (1, 1, 1)),
        (dict(cap=400), (10, 400, 400)),
        (dict(cap=100, temperature=2.0), (10**0.5, 10, 10)),
    ],
)
def test_shares_follow_the_sizes_capped_and_flattened(options, shares):
    found = counts(plan(**options), 0, 20_000)
    for name, share in zip(SIZES, shares):
        assert found[name] / 20_000 == pytest.approx(share / sum(shares), rel=0.02)


@pytest.mark.parametrize("options", [dict(epochs={"chat": 3, "code": 1.5}), dict(epochs={"chat": 2}, temperature=5.0)])
def test_a_source_is_read_as_often_as_it_may_be_and_no_more(options):
    mix = plan(**options)
    seen = Counter(mix[i] for i in range(10_000))
    rows = counts(mix, 0, 10_000)
    for name, bound in options["epochs"].items():
        assert rows[name] == int(bound * SIZES[name])
    assert set(seen.values()) == {1}, "each source goes through its own rows one by one"
    assert rows["docs"] == max(nth for name, nth in seen if name == "docs") + 1


def test_what_one_may_not_give_the_others_do_in_their_proportions():
    mix = plan(weights={"chat": 1, "code": 1, "docs": 2}, epochs={"chat": 1})
    assert counts(mix, 0, 40) == dict(chat=10, code=10, docs=20)
    assert counts(mix, 40, 340) == dict(code=100, docs=200)


def test_one_bound_for_all_ends_the_data_and_says_when():
    assert counts(plan(epochs=2, until=4_020), 0, 4_020) == {name: 2 * size for name, size in SIZES.items()}
    with pytest.raises(Mistake, match=r"after 4,020 rows, 502 steps no source is left.*raise the bounds"):
        plan(epochs=2, until=4_021, batch=8)
    with pytest.raises(Mistake, match="after 2,010 rows no source"):
        plan(epochs=1)


def test_weights_change_at_their_steps_and_every_source_goes_on_where_it_was():
    mix = plan(schedule=[(0, {"docs": 1}), (10, {"docs": 1, "code": 3}), (20, {"code": 1, "chat": 1})], batch=8)
    assert counts(mix, 0, 80) == dict(docs=80)
    assert counts(mix, 80, 160) == dict(docs=20, code=60)
    assert counts(mix, 160, 10_160) == dict(chat=5_000, code=5_000)
    for name in SIZES:
        own = [nth for source, nth in map(mix.__getitem__, range(1_000)) if source == name]
        assert own == list(range(len(own)))


def test_bounds_hold_across_a_schedule():
    mix = plan(schedule=[(0, {"chat": 1, "docs": 1}), (1, {"chat": 1, "code": 1})], batch=8, epochs={"chat": 1})
    assert counts(mix, 0, 8) == dict(chat=4, docs=4)
    assert counts(mix, 8, 20) == dict(chat=6, code=6)
    assert counts(mix, 20, 100) == dict(code=80)
    with pytest.raises(Mistake, match="after 14 rows, 3 steps no source is left"):
        plan(schedule=[(0, {"docs": 1}), (1, {"chat": 1})], batch=4, epochs={"chat": 1})


def test_a_row_far_away_is_found_at_once():
    mix = plan(schedule=[(step, {"docs": 1 + step % 3, "code": 1}) for step in range(0, 3_000, 3)], batch=4)
    assert len(mix.stretches) == 1_000
    name, nth = mix[10**15]
    assert name in SIZES and nth > 10**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights={"dosc": 1}), "data.weights: the store has no 'dosc'; did you mean 'docs'"),
        (dict(weights={"docs": "1"}), "data.weights: docs has '1'"),
        (dict(weights={"docs": True}), "docs has True"),
        (dict(weights={"docs": 1}, temperature=2.0), "the shares come from weights, or a schedule.*; one"),
        (dict(weights={"docs": 1}, schedule=[(0, {"docs": 1})]), "the shares come from"),
        (dict(weights={"docs": 1}, cap=3), "the shares come from"),
        (dict(temperature=0), "data.temperature is a number above 0, not 0"),
        (dict(temperature=float("nan")), "data.temperature is a number above 0"),
        (dict(temperature=0.001), "data.temperature=0.001 is too near to 0; name the largest source in data.weights"),
        (dict(weights=1.0), r"data.weights is a number for each source, as in {'chat': 1.0}, not 1.0"),
        (dict(cap=-1), "data.cap is a number above 0, not -1"),
        (dict(epochs=0), "chat has 0; how often a source may be read"),
        (dict(epochs="2"), "data.epochs is a number, or one by source, not '2'"),
        (dict(epochs={"dosc": 1}), "data.epochs: the store has no 'dosc'; did you mean 'docs'"),
        (dict(epochs={"docs": -1}), "docs has -1"),
        (dict(schedule=[]), r"data.schedule is a list like .*not \[\]"),
        (dict(schedule=[(5, {"docs": 1})]), r"begin at 0 and rise; these are \[5\]"),
        (dict(schedule=[(0, {"docs": 1}), (0, {"docs": 1})]), r"these are \[0, 0\]"),
        (dict(schedule=[(0.5, {"docs": 1})]), "data.schedule is a list like"),
        (dict(schedule={"docs": 1}), "data.schedule is a list like"),
        (dict(schedule=[(0, {"docs": 1}), (9, {"dcs": 1})]), "from step 9: the store has no 'dcs'"),
        (dict(schedule=[(0, {"docs": 0})]), "from step 0: .* no positive weight"),
    ],
)
def test_a_mistake_names_the_value_and_the_choices(options, message):
    with pytest.raises(Mistake, match=message):
        plan(**options)
