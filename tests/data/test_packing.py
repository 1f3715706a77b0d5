"""Promises of packing: nothing predicted twice, nothing forgotten, no row too long, no document cut without need."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm.data.packing import PACKINGS, best_fit, split

sizes_of_documents = st.lists(st.integers(0, 30), min_size=1, max_size=40)
lengths_of_rows = st.integers(2, 12)
packings = pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS.keys())


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def rows_of(plan):
    """Each row as a list of pieces, a piece as a list of positions in the stream."""
    return [[list(range(s, s + n)) for s, n in zip(*map(np.ndarray.tolist, plan[i]))] for i in range(len(plan))]


@packings
@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=150, deadline=None)
def test_every_token_but_a_documents_first_is_predicted_exactly_once(pack, sizes, length):
    offsets = offsets_of(sizes)
    plan = pack(offsets, length)
    predicted = Counter(token for row in rows_of(plan) for piece in row for token in piece[1:])
    assert predicted == Counter(token for a, b in zip(offsets, offsets[1:]) for token in range(a + 1, b))
    assert plan.predicted == predicted.total()


@packings
@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=150, deadline=None)
def test_no_row_overflows_and_no_piece_spans_two_documents(pack, sizes, length):
    offsets = offsets_of(sizes)
    plan = pack(offsets, length)
    for row in rows_of(plan):
        assert 0 < sum(map(len, row)) <= length
        assert all(len(set(np.searchsorted(offsets, piece, "right"))) == 1 for piece in row)
        assert [piece[0] for piece in row] == sorted(piece[0] for piece in row)


@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=100, deadline=None)
def test_padding_is_the_share_of_places_without_a_token(sizes, length):
    for pack in PACKINGS.values():
        plan = pack(offsets_of(sizes), length)
        empty = sum(length - sum(map(len, row)) for row in rows_of(plan))
        assert plan.padding == pytest.approx(empty / (len(plan) * length) if len(plan) else 0)


@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=100, deadline=None)
def test_split_rows_are_the_stream_with_one_token_of_overlap(sizes, length):
    offsets = offsets_of(sizes)
    rows = [[token for piece in row for token in piece] for row in rows_of(split(offsets, length))]
    total, step = offsets[-1], length - 1
    assert rows == [list(range(at, min(at + length, total))) for at in range(0, total - 1, step)]


@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=100, deadline=None)
def test_best_fit_cuts_only_documents_longer_than_a_row(sizes, length):
    offsets = offsets_of(sizes)
    pieces = {(piece[0], len(piece)) for row in rows_of(best_fit(offsets, length)) for piece in row}
    assert all((start, size) in pieces for start, size in zip(offsets, sizes) if 2 <= size <= length)


@given(sizes_of_documents, lengths_of_rows)
@settings(max_examples=150, deadline=None)
def test_best_fit_needs_as_many_rows_as_best_fit_decreasing_one_piece_at_a_time(sizes, length):
    pieces = [piece for size in sizes for piece in cut(size, length)]
    room = []
    for piece in sorted(pieces, reverse=True):
        fitting = [r for r in room if r >= piece]
        if fitting:
            room[room.index(min(fitting))] -= piece
        else:
            room.append(length - piece)
    plan = best_fit(offsets_of(sizes), length)
    assert sorted(length - sum(map(len, row)) for row in rows_of(plan)) == sorted(room)


def cut(size, length):
    while size > length:
        yield length
        size -= length - 1
    if size > 1:
        yield size


def test_best_fit_wastes_next_to_nothing_on_many_documents():
    sizes = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 1
    plan = best_fit(offsets_of(sizes), 1025)
    assert plan.padding < 0.001
    assert plan.predicted == (sizes - 1).sum()


def test_a_plan_is_the_same_every_time():
    sizes = np.random.default_rng(0).integers(0, 300, 500)
    first, again = best_fit(offsets_of(sizes), 129), best_fit(offsets_of(sizes), 129)
    for name in ("starts", "lengths", "first"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_only_the_chosen_documents_are_packed():
    plan = best_fit(offsets_of([4, 5, 6, 7]), 16, np.array([0, 2]))
    assert rows_of(plan) == [[[0, 1, 2, 3], [9, 10, 11, 12, 13, 14]]]


@packings
@pytest.mark.parametrize("sizes", [[], [0], [1], [1, 0, 0]])
def test_what_holds_nothing_to_predict_makes_no_row(pack, sizes):
    plan = pack(offsets_of(sizes), 8)
    assert (len(plan), plan.predicted, plan.padding) == (0, 0, 0)
