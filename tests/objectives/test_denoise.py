"""BART's noise: gaps of drawn lengths, sentences in any order, and the whole text as the answer."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm import objectives
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs, denoise
from tests.objectives.texts import BOS, EOS, MASK, STOP, UNKNOWN, WORDS, pack, pairs, text

documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)
options = st.sampled_from([{}, dict(permute=False), dict(rate=0.6, span=1.0), dict(rate=0.15, span=8.0)])


def spelled(tokens):
    return "".join(chr(0x4E00 + int(token)) for token in tokens)


def fits(noisy, text):
    """Whether `noisy`, with any tokens for each mask, is `text`."""
    pattern = re.escape(spelled(noisy)).replace(spelled([MASK]), "(.*)")
    return re.fullmatch(pattern, spelled(text))


@settings(deadline=None)
@given(documents, options, st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_target_is_the_whole_text_and_the_source_has_gaps_in_it(lengths, how, whole, isolate, seed):
    length = 64
    texts = [text(n, seed + i, bos=whole, eos=whole, unknown=True) for i, n in enumerate(lengths)]
    row = pack(texts, length - 1, isolate)
    example = denoise.features(row, np.random.default_rng(seed), WORDS, length, **how)
    bodies = [document.tolist() for document in _pairs.documents(row, WORDS)]
    found = pairs(example)
    for source, target in found:
        body = target[:-1]
        assert any(body == b[: len(body)] or body == b[len(b) - len(body) :] for b in bodies)
        assert source[-1] == target[-1] == EOS and len(source) <= len(target)
        for special in (BOS, EOS, UNKNOWN):  # never in a gap
            assert source.count(special) == target.count(special)
        left = sorted(token for token in source if token != MASK)
        gone = len(target) - len(left)
        text_only = sum(token not in (BOS, EOS, UNKNOWN) for token in target)
        assert gone == round(how.get("rate", 0.3) * text_only)
        if how.get("permute") is False:
            assert fits(source, target)
    if whole and isolate:
        assert sum(len(target) - 1 for _, target in found) == sum(len(b) for b in bodies if b != [BOS])


@given(st.integers(2, 200), st.integers(0, 99))
def test_sentences_change_places_and_stay_whole(length, seed):
    tokens = text(length, seed)
    rng = np.random.default_rng(seed)
    noisy = denoise.permuted(tokens, WORDS.special_V[tokens], WORDS.stops_V[tokens], rng)
    cut = lambda tokens: sorted(map(tuple, np.split(tokens, np.flatnonzero(tokens == STOP) + 1)))  # noqa: E731
    last = tokens[-1] == STOP
    if last:
        assert cut(noisy) == cut(tokens)
    assert sorted(noisy) == sorted(tokens)


def test_every_order_of_the_sentences_is_as_likely():
    tokens = np.array([200, STOP, 201, STOP, 202, STOP])
    seen = [
        tuple(denoise.permuted(tokens, np.zeros(6, bool), tokens == STOP, np.random.default_rng(i)))
        for i in range(3000)
    ]
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 6 and abs(counts / 3000 - 1 / 6).max() < 0.03


def test_lengths_are_poissons_and_so_some_spans_are_of_nothing():
    lengths = denoise._lengths(100_000, 3.0, np.random.default_rng(0))
    want = np.random.default_rng(1).poisson(3.0, 10**6)
    assert lengths.sum() == 100_000
    for n in range(8):
        assert abs((lengths == n).mean() - (want == n).mean()) < 0.006
    tokens = text(20_000)
    special, rng = np.zeros(len(tokens), bool), np.random.default_rng(0)
    noisy = denoise.infilled(tokens, special, MASK, rng, rate=0.3, span=3.0)
    drawn = denoise._lengths(6000, 3.0, np.random.default_rng(0))
    assert (noisy == MASK).sum() == len(drawn) and (drawn == 0).sum() > 50
    assert len(noisy) == 14_000 + len(drawn)


def test_every_place_of_a_span_is_as_likely():
    """One span of two tokens among five: it begins at each of four places."""
    tokens, draws = np.arange(200, 205), 4000
    where = []
    for seed in range(draws):
        noisy = denoise.infilled(tokens, np.zeros(5, bool), MASK, np.random.default_rng(seed), rate=0.4, span=50.0)
        assert (noisy == MASK).sum() == 1
        where.append(int(np.flatnonzero(noisy == MASK)[0]))
    np.testing.assert_allclose(np.bincount(where) / draws, 1 / 4, atol=0.03)


def test_wrong_options_are_named_before_training():
    def make(**options):
        return objectives.of({"name": "denoise", **options}, length=64, words=WORDS, kind="encoder-decoder")

    assert make().row == 63
    for options, message in (
        (dict(rate=2), "rate=2"),
        (dict(span=0), "span=0"),
        (dict(permute="no"), "permute is True or False, not 'no'"),
    ):
        with pytest.raises(Mistake, match=f"config.objective.{message}"):
            make(**options)
