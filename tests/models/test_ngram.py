"""Promises of the counting baselines."""

from collections import defaultdict
import lzma
import math
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm.lookup import Mistake
from jaxlm.models import ngram

VOCAB = 7


def corpus(documents=40, seed=0):
    """Documents with structure at several orders: a noisy walk, begun with token 0."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        walk = [0]
        for _ in range(rng.integers(0, 30)):
            walk.append(int((walk[-1] * 2 + len(walk) % 2 + (rng.random() < 0.3) * rng.integers(VOCAB)) % VOCAB))
        made.append(np.array(walk))
    return made


def distribution(model, context):
    """p(. | context), read off the last prediction of one document for each next token."""
    return np.exp([-model.nll(np.append(context, token))[-1] for token in range(model.vocab)])


class Slow:
    """Chen & Goodman's recursion as it is written in the paper, over dictionaries; None pads the first context."""

    def __init__(self, documents, order):
        self.order, self.counts = order, [defaultdict(int) for _ in range(order + 1)]
        for document in documents:
            padded = [None] * (order - 1) + [int(token) for token in document]
            for end in range(order, len(padded)):
                self.counts[order][tuple(padded[end - order + 1 : end + 1])] += 1
        for n in range(order - 1, 0, -1):
            for gram in self.counts[n + 1]:
                self.counts[n][gram[1:]] += 1
        self.discounts = [[0, 0, 0, 0]] + [self.discount(list(c.values())) for c in self.counts[1:]]

    def discount(self, counts):
        n = [counts.count(r) for r in range(5)]
        if not all(n[1:]):
            return [0, 0.5, 1, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [r - (r + 1) * y * n[r + 1] / n[r] for r in (1, 2, 3)]
        return [0, *found] if min(found) > 0 else [0, 0.5, 1, 1.5]

    def probability(self, context, token):
        n = len(context) + 1
        below = self.probability(context[1:], token) if context else 1 / VOCAB
        following = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        if not following:
            return below
        discount = lambda c: self.discounts[n][min(c, 3)]  # noqa: E731
        total, count = sum(following.values()), following.get((*context, token), 0)
        return (count - discount(count) + sum(map(discount, following.values())) * below) / total

    def nll(self, document):
        padded = [None] * (self.order - 1) + [int(token) for token in document]
        ends = range(self.order, len(padded))
        return [-math.log(self.probability(tuple(padded[e - self.order + 1 : e]), padded[e])) for e in ends]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_model_equals_the_paper_written_with_dictionaries(order):
    model, slow = ngram.fit(corpus(), order, VOCAB), Slow(corpus(), order)
    for document in corpus(5, seed=1):
        np.testing.assert_allclose(model.nll(document), slow.nll(document), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
@given(context=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_probabilities_sum_to_one_after_any_context_seen_or_not(order, context):
    model = ngram.fit(corpus(12), order, VOCAB)
    assert distribution(model, context).sum() == pytest.approx(1, abs=1e-12)


def test_a_bigram_matches_the_hand_calculation():
    # 0 1 0 1 0 2: 0 1 and 1 0 twice, 0 2 once; each token has one kind of left neighbour. Discounts 0.5 and 1.
    model = ngram.fit([np.array([0, 1, 0, 1, 0, 2])], 2, vocab=4)
    unigram = (1 - 0.5) / 3 + (3 * 0.5) / 3 / 4
    assert np.exp(-model.nll(np.array([1, 0]))) == pytest.approx([(2 - 1) / 2 + 1 / 2 * unigram])
    assert np.exp(-model.nll(np.array([0, 2]))) == pytest.approx([(1 - 0.5) / 3 + (1 + 0.5) / 3 * unigram])
    assert np.exp(-model.nll(np.array([3, 1]))) == pytest.approx([unigram])
    assert np.exp(-model.nll(np.array([3, 3]))) == pytest.approx([(3 * 0.5) / 3 / 4])


def test_order_one_counts_tokens_but_not_the_given_first_ones():
    model = ngram.fit([np.array([0, 1, 1, 2])] * 3, 1, vocab=3)  # counts 0, 6, 3; a discount of 1.5 from both
    assert distribution(model, [0]) == pytest.approx([3 / 9 / 3, 4.5 / 9 + 3 / 9 / 3, 1.5 / 9 + 3 / 9 / 3])


def test_the_first_token_is_given_and_every_other_one_predicted():
    model = ngram.fit(corpus(), 3, VOCAB)
    assert [len(model.nll(np.zeros(n, int))) for n in (0, 1, 2, 9)] == [0, 0, 1, 8]


def test_a_document_does_not_see_the_one_before_it():
    apart = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    model = ngram.fit(apart * 3, 2, VOCAB)
    assert distribution(model, [2]) == pytest.approx(distribution(model, [6]))  # nothing ever followed either


def test_longer_contexts_help_on_text_that_has_them():
    held_out = corpus(40, seed=1)
    models = [ngram.fit(corpus(400), order, VOCAB) for order in (1, 2, 3)]
    nats = [sum(model.nll(document).sum() for document in held_out) for model in models]
    assert nats[0] > nats[1] > nats[2]


def test_a_vocabulary_of_any_size_fits_the_keys():
    apart = 40_000  # the same text with ids far apart: the keys of 6-grams would need 110 bits if not ranked
    small, large = ngram.fit(corpus(), 6, VOCAB), ngram.fit([d * apart for d in corpus()], 6, VOCAB * apart)
    for a, b in zip(small.levels, large.levels, strict=True):
        np.testing.assert_allclose(a.discounted, b.discounted)
        np.testing.assert_allclose(a.backoff, b.backoff)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(Mistake, match="at least 1 token, not 0"):
        ngram.fit(corpus(), 0, VOCAB)
    with pytest.raises(Mistake, match="nothing to count"):
        ngram.fit([np.array([1]), np.array([], int)], 2, VOCAB)
    with pytest.raises(Mistake, match="from 0 to 9, but the vocabulary has 7"):
        ngram.fit([np.array([0, 9])], 2, VOCAB)


def test_xz_is_measured_against_the_bytes_of_the_text():
    texts = ["läuft " * 50, "und läuft"]
    content = "".join(texts).encode()
    compressed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    assert ngram.compressed_bits_per_byte(texts) == 8 * len(compressed) / len(content)
    assert lzma.decompress(compressed) == content


class Memory:
    """A split of a token store, in memory."""

    def __init__(self, documents):
        self.tokens = np.concatenate(documents)
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
        self.bytes = np.array([2 * (len(d) - 1) for d in documents])  # as if a token stood for two bytes
        self.tokens_count = len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def test_baselines_divide_the_nats_of_all_held_out_documents_by_their_bytes():
    splits = {"train": Memory(corpus()), "validation": Memory(corpus(9, seed=1))}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(chr(97 + i) for i in ids))
    store = SimpleNamespace(
        path="memory", split=lambda source, split: splits[split], vocab=VOCAB, tokenizer=lambda: tokenizer,
        predicted_bytes=lambda source, split: int(splits[split].bytes.sum()),
    )  # fmt: skip
    found = ngram.baselines(store, "walks", orders=[2])
    nats = ngram.fit(corpus(), 2, VOCAB)
    bits = sum(nats.nll(d).sum() for d in corpus(9, seed=1)) / math.log(2)
    assert found["2-gram"] == pytest.approx(bits / splits["validation"].bytes.sum())
    assert set(found) == {"2-gram", "xz"}
    splits["validation"].bytes[:] = 0
    with pytest.raises(Mistake, match="'walks' of store memory has no validation text"):
        ngram.baselines(store, "walks")
