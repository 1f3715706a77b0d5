"""Masked language modelling: what is masked, how much of it, by what; and pairs of texts."""

import dataclasses
import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import rows, tokenizers
from jaxlm.data.words import MASK, Words
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import mlm
from tests.data.test_rows import MemoryStore
from tests.trees import noisy

# A vocabulary of ids 5 to 104: tens begin a word, and the others go on with it. 0 to 4 are specials.
PAD, CLS, SEP, MASKED = 0, 2, 3, 4
V = 105
KNOWN = Words(
    special_V=np.arange(V) < 5, opens_V=(np.arange(V) < 5) | (np.arange(V) % 10 == 0), closes_V=np.arange(V) < 5,
    stops_V=np.zeros(V, bool), specials={"[MASK]": MASKED}, bos=CLS, eos=SEP, pad=PAD,
)  # fmt: skip

words_ = st.lists(st.tuples(st.integers(1, 10), st.integers(0, 9)), min_size=1, max_size=20)
documents_ = st.lists(words_, min_size=0, max_size=5)
seeds = st.integers(0, 2**32 - 1)
units = st.sampled_from(mlm.UNITS)
rates = st.sampled_from([0.05, 0.15, 0.4, 0.9])


def document(words):
    """[CLS] words [SEP]; a word is its first token and how many go on with it."""
    pieces = [np.append(10 * first, 10 * first - 5 + np.arange(more) % 5) for first, more in words]
    return np.concatenate([[CLS], *pieces, [SEP]])


def packed(documents, length=None):
    """Documents end to end, and padding."""
    parts = [document(words) for words in documents]
    size = sum(map(len, parts))
    tokens, segments = np.zeros((2, length or size + 3), np.int32)
    tokens[: min(size, len(tokens))] = np.concatenate([*parts, []])[: len(tokens)]
    segments[:size] = np.repeat(np.arange(len(parts)) + 1, [len(part) for part in parts])[: len(tokens)]
    return {"tokens": tokens, "segments": segments}


def masked(row, seed, **options):
    return mlm.features(row, np.random.default_rng(seed), KNOWN, len(row["tokens"]), **options)


def whole_words(row):
    """Which word each token is of, from 1; 0 for specials."""
    may = row["tokens"] >= 5
    return np.cumsum(may & (row["tokens"] % 10 == 0)) * may


@given(documents_, seeds, units, rates)
def test_the_original_is_in_the_example(documents, seed, unit, rate):
    row = packed(documents)
    example = masked(row, seed, unit=unit, rate=rate)
    chosen = example["weights"] > 0
    np.testing.assert_array_equal(np.where(chosen, example["labels"], example["tokens"]), row["tokens"])
    np.testing.assert_array_equal(example["segments"], row["segments"])
    assert not example["labels"][~chosen].any()
    assert not KNOWN.special_V[row["tokens"][chosen]].any(), "no special is masked"
    changed = example["tokens"][example["tokens"] != row["tokens"]]
    assert not KNOWN.special_V[changed[changed != MASKED]].any(), "and none is drawn"


@given(documents_, seeds, units, rates)
def test_the_share_that_was_asked_for_is_chosen_and_never_more(documents, seed, unit, rate):
    row = packed(documents)
    may, count = int((row["tokens"] >= 5).sum()), int(masked(row, seed, unit=unit, rate=rate)["weights"].sum())
    budget = mlm.budget(rate, may)
    longest = np.bincount(whole_words(row))[1:].max(initial=0)
    assert count <= budget <= mlm.budget(rate, len(row["tokens"]))
    if unit == "token":
        assert count == budget == (min(may, max(1, round(rate * may))))
    else:  # a word that does not fit is left alone
        assert count == budget or count > budget - longest


@given(documents_, seeds, st.sampled_from(["word", "span"]), rates)
def test_a_word_is_chosen_whole_or_not_at_all(documents, seed, unit, rate):
    row = packed(documents)
    chosen, word = masked(row, seed, unit=unit, rate=rate)["weights"] > 0, whole_words(row)
    for one in range(1, word.max() + 1):
        assert len(set(chosen[word == one])) == 1


@functools.cache
def many(unit, **options):
    """Rows of 512 one-token words: 300 examples."""
    rng = np.random.default_rng(0)
    row = {"tokens": 10 * rng.integers(1, 11, 512).astype(np.int32), "segments": np.ones(512, np.int32)}
    return row["tokens"], [masked(row, seed, unit=unit, **options) for seed in range(300)]


@pytest.mark.parametrize("unit", mlm.UNITS)
@pytest.mark.parametrize("mask, random", [(0.8, 0.1), (0.5, 0.4), (1.0, 0.0)])
def test_of_the_chosen_tokens_the_shares_become_the_mask_or_any_token_or_stay(unit, mask, random):
    _, examples = many(unit, mask=mask, random=random)
    seen = np.concatenate([example["tokens"][example["weights"] > 0] for example in examples])
    labels = np.concatenate([example["labels"][example["weights"] > 0] for example in examples])
    assert len(labels) == 300 * 77  # 15 % of 512
    # a drawn token is the very one in 1 % of all draws; a span has one fate, so there are fewer of them
    tolerance = 5 * (0.25 / (len(labels) / (4 if unit == "span" else 1))) ** 0.5
    assert (seen == MASKED).mean() == pytest.approx(mask, abs=tolerance)
    assert ((seen != MASKED) & (seen != labels)).mean() == pytest.approx(0.99 * random, abs=tolerance)
    drawn = np.bincount(seen[(seen != MASKED) & (seen != labels)], minlength=V)
    assert not drawn[:5].any() and (drawn[5:].min() > 0 or not random), "any token of the vocabulary"


def test_every_place_is_chosen_alike():
    for unit in mlm.UNITS:
        _, examples = many(unit)
        share = np.mean([example["weights"] for example in examples], axis=0)
        assert share.mean() == pytest.approx(77 / 512)
        assert np.abs(share[16:-16] - share.mean()).max() < 5 * (0.13 / 300) ** 0.5
    # As in SpanBERT, the ends of a text are in fewer spans than its middle.


def test_spans_have_the_lengths_of_a_geometric_law_cut_at_ten():
    """SpanBERT's figure 2: a mean of 3.8."""
    rng, units = np.random.default_rng(0), np.arange(10_000)
    runs = mlm._runs(units, units + 1, units > 0, rng, 0.1)
    lengths = runs[:, 1] - runs[:, 0]
    want = 0.2 * 0.8 ** np.arange(10)
    assert lengths.sum() == 1000 and lengths.max() <= 10
    found = np.bincount(lengths, minlength=11)[1:] / len(lengths)
    np.testing.assert_allclose(found, want / want.sum(), atol=4 * (0.2 * 0.8 / len(lengths)) ** 0.5)
    assert want @ (1 + np.arange(10)) / want.sum() == pytest.approx(3.8, abs=0.01)
    covered = np.concatenate([np.arange(*run) for run in runs])
    assert len(set(covered)) == len(covered), "and none on another"


@given(documents_, seeds, rates)
def test_a_span_stays_in_its_document_and_between_specials(documents, seed, rate):
    row = packed(documents)
    where = mlm._units(row["tokens"], row["segments"], KNOWN, whole=True)
    for start, stop in mlm._runs(*where, np.random.default_rng(seed), rate):
        assert len(set(row["segments"][start:stop])) == 1 and not KNOWN.special_V[row["tokens"][start:stop]].any()


def test_documents_without_specials_between_them_are_kept_apart_too():
    segments = np.repeat([1, 2, 3], 6)
    tokens = np.full(18, 11)  # of one word, as far as the tokens tell
    starts, _, joined = mlm._units(tokens, segments, KNOWN, whole=True)
    assert starts.tolist() == [0, 6, 12] and not joined.any()


@pytest.mark.parametrize("unit", ["word", "span"])
@pytest.mark.parametrize("spec", [dict(kind="bytes"), dict(kind="sentencepiece", vocab=300, algorithm="bpe")])
def test_text_without_blanks_is_masked_at_the_rate_that_was_asked_for(unit, spec):
    """A paragraph of Chinese, in bytes a word that no budget would hold."""
    tokenizer = tokenizers.train(["the cat sat on the mat. a dog ran"] * 9, spec | dict(extra=["<mask>"]))
    known, tokens = Words.of(tokenizer), np.array(tokenizer.encode("语言模型学习预测文本中的下一个词" * 9)[:384])
    row = {"tokens": tokens, "segments": np.ones(len(tokens), np.int32)}
    for seed in range(9):
        example = mlm.features(row, np.random.default_rng(seed), known, len(tokens), unit=unit)
        assert example["weights"].mean() == pytest.approx(0.15, abs=0.01)


# Pairs. In these stores each token tells its document: 10 x document + 10, and no word has two tokens.

LENGTH = 32


@functools.cache
def store():
    rng = np.random.default_rng(0)
    sizes = [3, *rng.integers(40, 90, 9)]
    texts = [10 * (i + 1) - 5 + np.arange(size) % 5 for i, size in enumerate(sizes)]
    return MemoryStore(docs=[np.concatenate([[CLS], text, [SEP]]) for text in texts])


EACH_TOKEN = Words(
    special_V=KNOWN.special_V, opens_V=np.ones(V, bool), closes_V=np.ones(V, bool), stops_V=KNOWN.stops_V,
    specials=KNOWN.specials, bos=CLS, eos=SEP, pad=PAD,
)  # fmt: skip


@functools.cache
def pairs(next, count=3000):
    options = dict(next=next)
    stream = rows.train(store(), length=mlm.row(LENGTH, EACH_TOKEN, **options), seed=0, pairs=True)
    return [mlm.features(stream[i], np.random.default_rng(i), EACH_TOKEN, LENGTH, **options) for i in range(count)]


def texts_of(example):
    """The two texts of an example, unmasked."""
    tokens = np.where(example["weights"] > 0, example["labels"], example["tokens"])
    real, second = example["segments"] > 0, example["types"] > 0
    one, two = tokens[real & ~second], tokens[second]
    assert one[0] == CLS and one[-1] == two[-1] == SEP and not tokens[~real].any() and not second[~real].any()
    assert SEP not in one[1:-1] and SEP not in two[:-1] and CLS not in [*one[1:], *two]
    return one[1:-1], two[:-1]


@pytest.mark.parametrize("next", ["nsp", "sop"])
def test_half_of_the_pairs_follow(next):
    told = np.asarray([example["follows"] for example in pairs(next)])
    assert set(told) == {0, 1, 2} and (told == 0).mean() < 0.15
    assert (told[told > 0] == 1).mean() == pytest.approx(0.5, abs=5 * (0.25 / len(told)) ** 0.5)


def test_what_does_not_follow_is_of_another_document_and_never_of_the_same():
    for example in pairs("nsp"):
        one, two = (set((text - 5) // 10) for text in texts_of(example))
        if example["follows"]:
            assert len(one) == len(two) == 1
            assert (one == two) == (example["follows"] == 1)
        else:
            assert not (one and two)


@pytest.mark.parametrize("next", ["nsp", "sop"])
def test_what_follows_goes_on_where_the_first_text_ends(next):
    for example in pairs(next):
        one, two = texts_of(example)
        if example["follows"] == 1:
            assert two[0] % 5 == (one[-1] + 1) % 5
        elif example["follows"] == 2 and next == "sop":
            assert one[0] % 5 == (two[-1] + 1) % 5, "swapped"


@pytest.mark.parametrize("next", ["nsp", "sop"])
def test_lengths_do_not_tell_what_follows(next):
    def lengths(label):
        return np.asarray([list(map(len, texts_of(e))) for e in pairs(next) if e["follows"] == label])

    follows, not_so = lengths(1), lengths(2)
    deviation = follows.std(axis=0) * (2 / len(follows)) ** 0.5
    assert (np.abs(follows.mean(axis=0) - not_so.mean(axis=0)) < 4 * deviation).all()
    for n in range(1, LENGTH):  # and no total is of one kind alone
        totals = [(x.sum(axis=1) == n).sum() for x in (follows, not_so)]
        assert abs(totals[0] - totals[1]) <= 5 * max(1, sum(totals)) ** 0.5


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=30), seeds)
def test_a_pair_is_cut_where_words_begin(words, seed):
    row = packed([words], 61)
    row |= {f"other_{name}": x for name, x in packed([words[::-1]], 61).items()}
    example = mlm._pair(row, np.random.default_rng(seed), KNOWN, 64, other=False)
    if example["follows"]:
        one, two = texts_of(example | {"weights": np.zeros(64), "labels": np.zeros(64)})
        assert one[0] % 10 == two[0] % 10 == 0
        text = row["tokens"][(row["tokens"] >= 5)]
        both = np.concatenate([one, two] if example["follows"] == 1 else [two, one])
        begin = np.flatnonzero(text % 10 == 0)
        np.testing.assert_array_equal(both, text[begin[1] : begin[-1]])


# The loss.


@functools.cache
def model(**more):
    return Blueprint.of(dict(name="bert", layers=1, width=16, heads=2, mlp_width=32, context=64, **more), vocab=V)


def batch_of(examples):
    return {name: jnp.asarray(np.stack([e[name] for e in examples])) for name in examples[0]}


def test_the_loss_over_gathered_tokens_is_that_over_all():
    rng = np.random.default_rng(0)
    row = packed([[(int(w), 1) for w in rng.integers(1, 11, n)] for n in (9, 2, 15)], 64)
    batch = batch_of([masked(row, seed) for seed in range(3)])
    params = model().init(0)

    def gathered(params):
        return mlm.loss(model().bind(params), batch)

    def all_of_them(params):
        bound = model().bind(params)
        x_BTD, _ = bound.hidden(batch["tokens"], segments_BT=batch["segments"])
        return cross_entropy(bound.for_head(x_BTD), bound.head, batch["labels"], batch["weights"])

    for got, want in zip(jax.jit(gathered)(params)[:4], jax.jit(all_of_them)(params)[:4]):
        assert got == pytest.approx(float(want), rel=1e-5)
    grads = [jax.jit(jax.grad(lambda p, f=f: f(p).loss))(params) for f in (gathered, all_of_them)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *grads)


def test_the_loss_of_pairs_has_that_of_what_follows_and_filler_rows_count_nothing():
    examples = [e for e in pairs("nsp")[:40] if e["follows"]][:4]
    params = model().init(0)
    measure = jax.jit(lambda batch: mlm.loss(model().bind(params), batch))
    sums = measure(batch_of(examples))
    (nll, count), (right, _) = sums.others["next_loss"], sums.others["next_accuracy"]
    assert count == 4 and 0 <= right <= 4 and nll / count == pytest.approx(np.log(2), abs=0.1)
    assert sums.loss == pytest.approx(float(sums.nll + nll / count * sums.weight), rel=1e-5)
    filler = {name: np.zeros_like(x) for name, x in examples[0].items()}
    filled = measure(batch_of([*examples, filler, filler]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), filled, sums)


def test_the_second_text_has_a_type_of_its_own():
    batch = batch_of([e for e in pairs("sop")[:20] if e["follows"]][:2])
    measure = jax.jit(lambda batch: mlm.loss(model().bind(noisy(model())), batch).nll)
    assert abs(measure(batch) - measure(batch | {"types": jnp.zeros_like(batch["types"])})) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rate=2), r"config\.objective\.rate is a share of the tokens, above 0 and below 1, not 2"),
        (dict(rate=0), "not 0"),
        (dict(mask=0.8, random=0.3), r"mask=0\.8 and random=0\.3 are shares"),
        (dict(unit="words"), r"config\.objective\.unit has no 'words'; did you mean 'word'.*span, token, word"),
        (dict(next="nps"), r"config\.objective\.next has no 'nps'; did you mean 'nsp'.*nsp, sop"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(Mistake, match=message):
        mlm.row(LENGTH, KNOWN, **options)


def test_a_tokenizer_without_a_mask_or_ends_is_refused():
    bare = dataclasses.replace(KNOWN, specials={}, bos=None, eos=None)
    with pytest.raises(Mistake, match=f"no mask token .*tokenizer.extra=\\['{MASK[0]}'\\]"):
        mlm.row(LENGTH, bare)
    with pytest.raises(Mistake, match="has no bos or no eos"):
        mlm.row(LENGTH, dataclasses.replace(KNOWN, bos=None), next="nsp")
