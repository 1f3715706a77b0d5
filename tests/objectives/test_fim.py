"""A document's middle is asked for at its end, and nothing of it is lost."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm import objectives
from jaxlm.data import tokenizers
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs
from tests.data.test_tokenizers import SPECS, TEXTS
from tests.objectives.texts import BOS, EOS, MID, PRE, SUF, WORDS, pack, text

documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def segments(example):
    """The tokens of each document, with the last one's last token, which is a label alone."""
    found = []
    for segment in range(1, example["segments"].max() + 1):
        here = np.flatnonzero(example["segments"] == segment)
        last = [int(example["labels"][here[-1]])] if example["weights"][here[-1]] else []
        assert example["weights"][here[:-1]].all(), "the loss is over all tokens"
        np.testing.assert_array_equal(example["labels"][here[:-1]], example["tokens"][here[1:]])
        found.append(example["tokens"][here].tolist() + last)
    return found


def restored(tokens, marks=(PRE, SUF, MID), bos=BOS, eos=EOS):
    """A document's body, and its form."""
    pre, suf, mid = marks
    tokens = tokens[1:] if tokens[:1] == [bos] else tokens
    if tokens[:1] != [pre]:
        return (tokens[:-1] if tokens[-1:] == [eos] else tokens), "whole"
    assert tokens[-1] == eos and [tokens.count(mark) for mark in marks] == [1, 1, 1]
    s, m, rest = tokens.index(suf), tokens.index(mid), tokens[1:-1]
    if s == 1:
        return tokens[m + 1 : -1] + tokens[2:m], "SPM"
    assert rest[s - 1] == suf
    return tokens[1:s] + tokens[m + 1 : -1] + tokens[s + 1 : m], "PSM"


@settings(deadline=None)
@given(documents, st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_original_is_in_its_parts(lengths, rate, whole, isolate, seed):
    length = 64
    one = objectives.of(dict(name="fim", rate=rate, level="token"), length=length, words=WORDS, kind="decoder")
    texts = [text(n, seed + i, bos=whole, eos=whole, unknown=True) for i, n in enumerate(lengths)]
    row = pack(texts, one.row, isolate)
    example = one.features(row, np.random.default_rng(seed))
    originals = [d[int(d[:1] == [BOS]) :] for d in (x.tolist() for x in _pairs.documents(row, WORDS))]
    bodies, forms = zip(*map(restored, segments(example)))
    lost = sum(map(len, originals)) - sum(map(len, bodies))
    assert lost <= max(0, 4 * (len(originals) - 1)), "four tokens at most for each further document"
    for body, original in zip(bodies, originals):
        assert (not lost and body == original) or spelled(body) in spelled(original)
    assert set(forms) <= ({"whole"} if rate == 0 else {"PSM", "SPM"} if rate == 1 else {"whole", "PSM", "SPM"})
    assert all(np.array_equal(example[k], x) for k, x in one.features(row, np.random.default_rng(seed)).items())


def spelled(tokens):
    return "".join(chr(0x4E00 + int(token)) for token in tokens)


def test_half_the_documents_are_cut_half_of_those_with_the_suffix_first_and_anywhere():
    row = pack([text(50, 3, eos=True)], 61)
    one = objectives.of(dict(name="fim", level="token"), length=64, words=WORDS, kind="decoder")
    found = [segments(one.features(row, np.random.default_rng(seed)))[0] for seed in range(4000)]
    forms = [restored(tokens)[1] for tokens in found]
    for form, share in dict(whole=0.5, PSM=0.25, SPM=0.25).items():
        assert abs(forms.count(form) / 4000 - share) < 0.03
    middles = [len(t) - 2 - t.index(MID) for t, form in zip(found, forms) if form == "PSM"]
    x, y = np.sort(np.random.default_rng(0).integers(0, 51, (2, 10**5)), axis=0)
    assert abs(np.mean(middles) - (y - x).mean()) < 2
    assert min(middles) == 0 and max(middles) > 40, "a part may be empty or nearly all"


FIM = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.mark.parametrize("kind", SPECS)
def test_cut_between_characters_the_text_is_that_of_the_parts(kind):
    tokenizer = tokenizers.train(TEXTS, SPECS[kind] | {"extra": [*FIM, "<eos>"] if kind == "characters" else FIM})
    if tokenizer.eos is None:
        with pytest.raises(Mistake, match="the tokenizer has none"):
            objectives.of(dict(name="fim"), length=64, words=Words.of(tokenizer), kind="decoder")
        return
    words, body = Words.of(tokenizer), "for the objects, see below\nand then a function"
    ids = [*([tokenizer.bos] if tokenizer.add_bos else []), *tokenizer.encode(body), tokenizer.eos]
    one = objectives.of(dict(name="fim", rate=1.0), length=len(ids) + 40, words=words, kind="decoder")
    marks, inside = [tokenizer.specials[name] for name in FIM], 0
    again = tokenizer.decode(tokenizer.encode(body))
    for seed in range(40):
        tokens = segments(one.features(pack([np.array(ids)], one.row), np.random.default_rng(seed)))[0]
        found, form = restored(tokens, marks, tokenizer.bos, tokenizer.eos)
        assert form in ("PSM", "SPM") and tokenizer.decode(found) == again
        inside += found != tokenizer.encode(body)
    if kind not in ("bytes", "wordpiece"):  # pieces of several characters are cut inside
        assert inside > 10


def test_wrong_options_are_named_before_training():
    for options in (dict(rate=2), dict(spm=-1)):
        name, value = next(iter(options.items()))
        with pytest.raises(Mistake, match=f"config.objective.{name}={value!r}"):
            objectives.of({"name": "fim", **options}, length=64, words=WORDS, kind="decoder")
    with pytest.raises(Mistake, match=r"config\.objective\.level has no 'letter'"):
        objectives.of({"name": "fim", "level": "letter"}, length=64, words=WORDS, kind="decoder")
