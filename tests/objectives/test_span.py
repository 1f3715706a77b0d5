"""Span corruption is T5's, and what it takes out of a text can be put back."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import objectives
from jaxlm.data import rows
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.objectives import _pairs, span
from tests.objectives.texts import BOS, EOS, SENTINELS, UNKNOWN, WORDS, pack, pairs, restored, text
from tests.trees import noisy

KINDS = ("encoder-decoder", "decoder")
rates = st.sampled_from([(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.3, 1.0), (0.15, 64.0)])


def by_hand(length, rng, rate, mean):
    """random_spans_noise_mask, as T5 writes it: an indicator of where a segment begins is shuffled."""
    noise = min(max(int(np.round(length * rate)), 1), length - 1)
    spans = max(int(np.round(noise / mean)), 1)
    lengths = []
    for items in (length - noise, noise):
        begins = np.pad(rng.permutation((np.arange(items - 1) < spans - 1).astype(int)), (1, 0))
        lengths.append(np.bincount(np.cumsum(begins)))
    starts = np.cumsum(np.stack(lengths, axis=1).reshape(-1))[:-1]
    return np.cumsum(np.isin(np.arange(length), starts)) % 2 == 1


def test_the_noise_is_t5s_in_number_and_in_distribution():
    """Every mask of a short text comes as often as by T5's own procedure: they are all equally likely."""
    draws = 4000
    rng, powers = np.random.default_rng(0), 1 << np.arange(10)
    count = lambda masks: np.unique([mask.dot(powers) for mask in masks], return_counts=True)  # noqa: E731
    ours, seen = count([span.mask(10, rng, rate=0.4, span=2.0) for _ in range(draws)])
    theirs, wanted = count([by_hand(10, rng, 0.4, 2.0) for _ in range(draws)])
    assert ours.tolist() == theirs.tolist() and len(ours) == 15, "3 x 5 ways to cut 4 and 6 tokens in two"
    for number in (seen, wanted):
        assert abs(number / draws - 1 / 15).max() < 0.02


@given(st.integers(2, 600), rates, st.integers(0, 9))
def test_a_mask_has_the_tokens_and_spans_that_t5_computes(length, how, seed):
    rate, mean = how
    mask, wanted = (f(length, np.random.default_rng(seed), rate, mean) for f in (
        lambda n, rng, rate, mean: span.mask(n, rng, rate=rate, span=mean), by_hand))  # fmt: skip
    runs = lambda mask: (mask[1:] & ~mask[:-1]).sum()  # noqa: E731
    assert (mask.sum(), runs(mask), len(mask)) == (wanted.sum(), runs(wanted), length)
    assert not mask[0] and mask[-1]


def test_the_lengths_are_those_that_t5_publishes():
    """T5's random_spans_helper gives 568 raw tokens and 114 of the target for an input of 512."""
    assert span.row(512, WORDS) == 568
    example = span.features(pack([text(568)], 568), np.random.default_rng(0), WORDS, 512)
    assert (example["segments"] == 1).all() and example["decoder_segments"].tolist() == [1] * 114


@given(st.integers(32, 300), rates, st.integers(0, 3))
def test_a_text_that_fills_its_row_fills_the_inputs_to_the_last_token(length, how, seed):
    rate, mean = how
    tokens = span.row(length, WORDS, rate=rate, span=mean)
    example = span.features(
        pack([text(tokens)], tokens), np.random.default_rng(seed), WORDS, length, rate=rate, span=mean
    )
    assert (example["segments"] == 1).all() and (example["decoder_segments"] == 1).all()
    noise = np.isin(example["labels"], [*SENTINELS, EOS], invert=True).sum()
    assert noise == np.round(tokens * rate)


documents = st.lists(st.integers(1, 90), min_size=1, max_size=12)


@settings(deadline=None)
@given(documents, rates, st.sampled_from(KINDS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_original_is_in_the_inputs_and_targets(lengths, how, kind, whole, isolate, seed):
    """Of each document its whole text, or, where there is no room, one end of it; no special is ever masked."""
    rate, mean = how
    length = 64
    tokens = span.row(length, WORDS, rate=rate, span=mean, kind=kind)
    texts = [text(n, seed + i, bos=whole, eos=whole, unknown=True) for i, n in enumerate(lengths)]
    row = pack(texts, tokens, isolate)
    example = span.features(row, np.random.default_rng(seed), WORDS, length, rate=rate, span=mean, kind=kind)
    bodies = [document.tolist() for document in _pairs.documents(row, WORDS)]
    specials = {BOS, EOS, UNKNOWN}
    for source, target in pairs(example):
        body = restored(source, target)
        assert any(body == b[: len(body)] or body == b[len(b) - len(body) :] for b in bodies)
        assert source[-1] == EOS and target[-1] == EOS
        assert not specials & set(target[:-1]) and SENTINELS[0] == target[0]
    again = span.features(row, np.random.default_rng(seed), WORDS, length, rate=rate, span=mean, kind=kind)
    assert all(np.array_equal(example[key], again[key]) for key in example)


class Texts:
    """A split of a token store in memory, as its one source."""

    path, sources = "memory", ["texts"]

    def __init__(self, documents):
        self.tokens, self.offsets = np.concatenate(documents), np.cumsum([0, *map(len, documents)])

    def split(self, source, split):
        return self

    def read(self, start, stop):
        return self.tokens[start:stop]

    def predicted_bytes(self, source, split, documents):
        return 0

    def __len__(self):
        return len(self.offsets) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["span", "ul2"])
def test_short_documents_are_packed_so_that_no_token_is_left_out(name, kind):
    """An eos for each answer, and rounding, take more room than one text of their length does."""
    rng = np.random.default_rng(0)
    documents = [text(int(n), i, bos=True, eos=True) for i, n in enumerate(rng.integers(2, 30, 900))]
    options = dict(name=name) | (dict(shares=[1, 0, 1]) if name == "ul2" else {})
    task = objectives.of(options, length=256, words=WORDS, kind=kind)
    held_out = rows.validation(Texts(documents), "texts", length=task.row, cost=task.cost)
    found = []
    for index in range(len(held_out)):
        example = task.features(held_out[index], np.random.default_rng(index))
        found += [tuple(restored(source[name == "ul2" :], target)) for source, target in pairs(example)]
    assert sorted(found) == sorted(tuple(document[:-1].tolist()) for document in documents)


def test_documents_joined_to_one_text_lose_little_where_specials_part_their_gaps():
    kept = total = 0
    for seed in range(50):
        row = pack([text(12, seed * 100 + i, bos=True, eos=True) for i in range(40)], 568, isolate=False)
        example = span.features(row, np.random.default_rng(seed), WORDS, 512)
        kept += sum(len(restored(*pair)) for pair in pairs(example))
        total += len(_pairs.documents(row, WORDS)[0])
    assert kept / total > 0.9


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair(request):
    sizes = dict(layers=1, width=16, heads=2, mlp_width=32) | ({"head_width": 8} if request.param == "t5" else {})
    blueprint = Blueprint.of(dict(name=request.param, context=64, **sizes), vocab=WORDS.vocab)
    return blueprint.bind(noisy(blueprint)), blueprint.config


def test_the_loss_is_the_likelihood_of_the_targets_as_the_model_writes_them(pair):
    """Each document alone, its decoder's row begun with the model's start id: what `generate` does."""
    model, config = pair
    row = pack([text(20, 1, eos=True), text(12, 2, eos=True)], span.row(48, WORDS))
    example = span.features(row, np.random.default_rng(0), WORDS, 48)
    read = jax.jit(lambda source, target: model(source, target)[0])
    sums = jax.jit(lambda batch: _pairs.loss(model, batch))({key: jnp.asarray(x)[None] for key, x in example.items()})
    want = count = 0
    for source, target in pairs(example):
        logits = read(jnp.asarray([source]), jnp.asarray([[config.start, *target[:-1]]]))
        want -= jax.nn.log_softmax(logits[0])[jnp.arange(len(target)), jnp.asarray(target)].sum()
        count += len(target)
    assert count == float(sums.weight)
    np.testing.assert_allclose(sums.nll, want, rtol=1e-5)


def test_a_document_never_sees_its_neighbour(pair):
    model, _ = pair
    row = pack([text(20, 1, eos=True), text(20, 2, eos=True)], span.row(48, WORDS))
    example = span.features(row, np.random.default_rng(0), WORDS, 48)
    batch = {key: jnp.asarray(x)[None] for key, x in example.items()}
    batch["weights"] *= batch["decoder_segments"] == 1
    of = jax.jit(lambda tokens: _pairs.loss(model, batch | {"tokens": tokens}).nll)
    changed = jnp.where(batch["segments"] == 2, 5, batch["tokens"])
    assert of(batch["tokens"]) == of(changed)
    assert of(batch["tokens"]) != of(jnp.where(batch["segments"] == 1, 5, batch["tokens"]))


def test_wrong_options_are_named_before_training():
    def make(**options):
        return objectives.of({"name": "span", **options}, length=512, words=WORDS, kind="encoder-decoder")

    assert make().row == 568
    for options, message in {
        "rate": (dict(rate=2), "config.objective.rate=2"),
        "span": (dict(span=0.5), "config.objective.span=0.5"),
        "sentinels": (dict(rate=0.6, span=1.0), r"has 100 sentinels.*tokenizer.extra"),
        "kind": (dict(kind="decoder"), "has no 'kind'"),
    }.values():
        with pytest.raises(Mistake, match=message):
            make(**options)


def test_a_decoder_is_asked_for_the_target_alone():
    row = pack([text(20, 1, eos=True), text(30, 2, eos=True)], span.row(64, WORDS, kind="decoder"))
    example = span.features(row, np.random.default_rng(0), WORDS, 64, kind="decoder")
    for segment in (1, 2):
        here = example["segments"] == segment
        asked = example["labels"][here & (example["weights"] > 0)].tolist()
        assert asked[0] == SENTINELS[0] and asked[-1] == EOS and EOS not in asked[:-1]
        read = example["tokens"][here].tolist()
        assert [*itertools.takewhile(lambda token: token != EOS, read), EOS, *asked] == read
