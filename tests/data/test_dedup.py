"""Duplicates: exact ones and near ones are found, others stay, the first of its kind wins, and so on many machines."""

from collections import defaultdict
import itertools
import random

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm.data import dedup as duplicates
from jaxlm.data import shingles
from jaxlm.data.dedup import DROPPED, EXACT, KEPT, NEAR, Records, dedup, losers, verdicts
from jaxlm.lookup import Mistake

WORDS = [f"w{i}" for i in range(2000)]


def text(rng, length=200):
    return " ".join(rng.choices(WORDS, k=length))


def edited(rng, original, edits):
    words = original.split()
    for place in rng.sample(range(len(words)), edits):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def jaccard(d, one, other):
    a, b = set(d.shingles(one).tolist()), set(d.shingles(other).tolist())
    return len(a & b) / len(a | b)


def judge(d, texts, dropped=()):
    """Verdicts by name, as one machine finds them."""
    gone = np.isin(np.arange(len(texts)), list(dropped))
    signatures = np.stack([d.signature(t) for t in texts])
    digests = np.array([d.digest(t) for t in texts], np.uint64)
    records = Records(gone, digests, lambda band: d.band(signatures, band), lambda which: signatures[which])
    return verdicts(d, records).tolist()


def test_case_and_white_space_do_not_make_another_document_but_punctuation_does():
    d = dedup(near=None)
    assert judge(d, ["A cafe\u0301  is\nopen", "a CAFÉ is open", "a café is open.", "a+b", "a-b"]) == [
        0,
        EXACT,
        0,
        0,
        0,
    ]


def test_the_first_wins_and_what_a_rule_dropped_wins_over_nothing():
    texts = ["one and the same", "another", "one and the same", "one and the same"]
    assert judge(dedup(), texts) == [KEPT, KEPT, EXACT, EXACT]
    assert judge(dedup(), texts, dropped=[0]) == [DROPPED, KEPT, KEPT, EXACT]
    assert judge(dedup(exact=False), texts) == [KEPT, KEPT, NEAR, NEAR]


def test_near_duplicates_go_and_texts_of_one_topic_stay():
    rng = random.Random(0)
    first, other = text(rng), text(rng)
    half = " ".join(first.split()[:100] + other.split()[:100])
    assert judge(dedup(), [first, other, edited(rng, first, 2), half]) == [KEPT, KEPT, NEAR, KEPT]


def test_a_document_that_resembles_only_one_that_went_stays():
    """A ~ B ~ C but not A ~ C: B goes, so C has no double any more."""
    rng = random.Random(1)
    words = text(rng, 400).split()
    a, b, c = (" ".join(words[start : start + 300]) for start in (0, 35, 70))
    d = dedup(near=0.75, permutations=512)
    assert jaccard(d, a, b) > 0.78 and jaccard(d, a, c) < 0.65
    assert judge(d, [a, b, c]) == [KEPT, NEAR, KEPT]


def test_texts_shorter_than_a_shingle_are_alike_only_when_equal():
    assert judge(dedup(exact=False), ["one two", "one three", "One  two", "two"]) == [KEPT, KEPT, NEAR, KEPT]


def test_scripts_without_spaces_have_words_too():
    one = "委員会は古い市庁舎に集まり市長が全員に送った予算について話し合った長い夜であった"
    assert len(shingles.words(one)) == len(one) and shingles.words("ＡＢＣ abc，Straße") == ["abc", "abc", "strasse"]
    other = "彼女は海の近くの小さな家で犬と猫と一緒に静かに暮らしていて毎朝散歩をしているという"
    assert judge(dedup(ngram=3), [one, one + "。", other]) == [KEPT, NEAR, KEPT]


def test_hashes_do_not_depend_on_the_process_nor_on_the_library():
    """Stored by number: another version of a library that hashed otherwise would not find old duplicates."""
    assert shingles.hashes("The cat, the mat", 2).tolist() == [
        17500973761593676612,
        14347397326142673709,
        18436299660062216254,
    ]
    assert dedup().digest("The cat") == 15621612629676276010
    assert dedup().signature("the cat sat on the mat again")[:3].tolist() == [3595427496, 3434752436, 3855844374]


@given(st.lists(st.text("ab ", min_size=1, max_size=8), max_size=12), st.integers(1, 4))
def test_equal_runs_of_words_hash_alike_and_others_do_not(texts, n):
    found = defaultdict(set)
    for one in texts:
        words = shingles.words(one)
        for gram, number in zip(zip(*(words[i:] for i in range(n))), shingles.hashes(one, n).tolist(), strict=True):
            found[gram].add(number)
    assert all(len(numbers) == 1 for numbers in found.values())
    assert len({min(numbers) for numbers in found.values()}) == len(found)


def planted(seed, count=120):
    """Texts, one in two of which is an edited copy of an earlier one, at all levels of similarity."""
    rng = random.Random(seed)
    texts = [text(rng, rng.randint(20, 300)) for _ in range(count)]
    for _ in range(count):
        original = rng.choice(texts)
        texts.append(edited(rng, original, rng.randint(0, len(original.split()) // 30)))
    rng.shuffle(texts)
    return texts


def test_against_brute_force_only_pairs_near_the_threshold_are_judged_otherwise():
    d, texts = dedup(exact=False, permutations=256), planted(0)
    sets = [set(d.shingles(t).tolist()) for t in texts]
    verdict, kept = judge(d, texts), []
    for i, mine in enumerate(sets):
        best = max((len(mine & sets[j]) / len(mine | sets[j]) for j in kept), default=0)
        if best > 0.9:
            assert verdict[i] == NEAR, best
        if best < 0.7:
            assert verdict[i] == KEPT, best
        if verdict[i] == KEPT:
            kept.append(i)
    assert 60 < verdict.count(NEAR) < 120


@pytest.mark.parametrize("near", [0.5, 0.8, 0.95])
def test_a_machine_for_each_band_comes_to_the_same_verdicts(near):
    d, texts = dedup(near=near), planted(1)
    verdict = judge(d, texts)
    first, groups = {}, defaultdict(list)
    for i, one in enumerate(texts):
        first.setdefault(d.digest(one), i)
    signatures = {i: d.signature(texts[i]) for i in first.values()}
    for i, signature in signatures.items():
        for key in d.keys(signature):
            groups[key].append(i)
    pairs = {p for g in groups.values() for p in itertools.combinations(g, 2) if d.alike(*(signatures[i] for i in p))}
    gone = losers(sorted(pairs, key=lambda pair: hash(pair) % 97))
    assert {i for i, v in enumerate(verdict) if v == NEAR} == gone and gone
    assert {i for i, v in enumerate(verdict) if v == EXACT} == set(range(len(texts))) - set(signatures)


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda p: p[0] != p[1]), max_size=30))
def test_of_two_that_are_alike_one_goes_and_none_goes_without_an_earlier_one_that_stays(pairs):
    gone = losers(pairs)
    for a, b in pairs:
        assert a in gone or b in gone
    for document in gone:
        assert any(min(p) not in gone for p in pairs if max(p) == document)


@pytest.mark.parametrize("near", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold_almost_surely_and_are_no_shorter_than_that_asks_for(near):
    d = dedup(near=near)
    found = lambda rows: 1 - (1 - near**rows) ** (d.permutations // rows)  # noqa: E731
    assert found(d.rows) >= duplicates.RECALL and d.bands * d.rows <= d.permutations
    assert near == 1 or found(d.rows + 1) < duplicates.RECALL


def test_the_estimate_is_as_exact_as_minhash_is():
    rng, d = random.Random(2), dedup()
    errors = []
    for _ in range(100):
        one = text(rng)
        other = edited(rng, one, 5)
        errors.append((d.signature(one) == d.signature(other)).mean() - jaccard(d, one, other))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 1.3 * np.sqrt(0.8 * 0.2 / 256)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(near=1.5), "near is a similarity above 0 and up to 1, or None, not 1.5"),
        (dict(exact=False, near=None), "neither exact nor near"),
        (dict(ngram=0), "ngram=0"),
        (dict(permutations=8), "permutations=8"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        dedup(**options)
