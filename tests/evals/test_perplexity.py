"""Perplexity over windows, with models simple enough to know the answer."""

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm.evals.perplexity import Score, evaluate, windows
from jaxlm.lookup import Mistake


@given(length=st.integers(0, 200), context=st.integers(1, 40), data=st.data())
def test_each_token_is_scored_once_with_the_context_that_was_promised(length, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, stop, first in windows(length, context, stride):
        assert 0 <= start < first < stop <= length and stop - start <= context + 1
        for token in range(first, stop):
            scored.append(token)
            assert token - start >= min(token, context - stride + 1)
    assert scored == list(range(1, length))


def nll_of_identity(rows):
    """A token's id, in hundredths, as its nats: so that a sum tells which tokens were scored."""
    return rows[:, 1:] / 100


@pytest.mark.parametrize("stride", [1, 5, 16, None])
def test_sums_count_every_token_but_the_first_of_each_document(stride):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, n) for n in (1, 2, 16, 17, 18, 100, 0, 40)]
    scores = evaluate(nll_of_identity, [(d, 3 * len(d)) for d in documents], context=16, stride=stride, batch=3)
    for document, score in zip(documents, scores, strict=True):
        assert score.nats == pytest.approx(document[1:].sum() / 100)
        assert (score.tokens, score.bytes) == (max(len(document) - 1, 0), 3 * len(document))


def test_a_token_is_predicted_from_the_window_before_it():
    def nll(rows):  # how far behind the row's first token a token stands
        return np.broadcast_to(np.arange(1, rows.shape[1]), rows[:, 1:].shape)

    [score] = evaluate(nll, [(np.zeros(9, int), 8)], context=4, stride=2)
    assert score.nats == 1 + 2 + 3 + 4 + 3 + 4 + 3 + 4


def test_the_model_sees_few_shapes_whatever_the_lengths():
    shapes = set()

    def nll(rows):
        shapes.add(rows.shape)
        return np.zeros(rows[:, 1:].shape)

    evaluate(nll, ((np.zeros(n, int), n) for n in range(2, 300)), context=64, batch=4)
    assert {rows for rows, _ in shapes} == {4} and len(shapes) <= 5 and max(t for _, t in shapes) == 65


def test_figures_are_what_their_names_say():
    score = Score(nats=8 * math.log(2), tokens=4, bytes=2) + Score()
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(4)
    assert math.isnan(Score().loss) and math.isnan(Score().bits_per_byte)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_skip_tokens_is_a_mistake(stride):
    with pytest.raises(Mistake, match=f"stride={stride} is outside 1 to 8"):
        evaluate(nll_of_identity, [], context=8, stride=stride)
