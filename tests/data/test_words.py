"""What objectives know of a tokenizer: special ids, and where words begin."""

import numpy as np
import pytest

from jaxlm.data import tokenizers
from jaxlm.data.tokenizers import Named
from jaxlm.data.words import MASK, Words
from jaxlm.lookup import Mistake
from tests.data.test_tokenizers import SPECS, TEXTS

EXTRA = ["<mask>", "<extra_id_0>", "<extra_id_1>"]


@pytest.fixture(scope="module", params=SPECS)
def tokenizer(request):
    return tokenizers.train(TEXTS, SPECS[request.param] | {"extra": EXTRA})


def test_no_text_is_turned_into_a_special_and_a_special_into_no_text(tokenizer, tmp_path):
    words = Words.of(tokenizer)
    assert set(EXTRA) <= set(tokenizer.specials)
    assert not words.special_V[tokenizer.encode("a <mask> of <extra_id_0> or [MASK]")].any()
    assert tokenizer.decode([tokenizer.specials[name] for name in EXTRA]) == ""
    assert words.special_V[list(tokenizer.specials.values())].all() and len(words.special_V) == tokenizer.vocab
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.specials == tokenizer.specials and again.fingerprint == tokenizer.fingerprint


def test_words_begin_where_they_do_in_the_text(tokenizer):
    text = "for the objects, see below\nand then a function"
    ids = tokenizer.encode(text)
    where = np.flatnonzero(Words.of(tokenizer).begins(ids))
    found = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(where, [*where[1:], len(ids)])]
    want = ["for", "the", "objects", ",", "see", "below", "and", "then", "a", "function"]
    assert [piece for piece in found if piece] == want


def test_the_pieces_of_a_text_are_its_text(tokenizer):
    pieces = tokenizer.pieces()
    text = "".join(pieces[i] for i in tokenizer.encode("a function of the object"))
    assert text.replace(" ", "") == "afunctionoftheobject"


def test_specials_are_found_by_name_or_missed_with_advice(tokenizer):
    words = Words.of(tokenizer)
    assert words.find("mask", ["<mask>"]) == tokenizer.specials["<mask>"]
    assert words.sentinels == [tokenizer.specials[f"<extra_id_{i}>"] for i in range(2)]
    with pytest.raises(Mistake, match=r"no separator token \('<sep>'; its specials: .*\).*tokenizer.extra=\['<sep>'\]"):
        words.find("separator", ["<sep>"])


def test_specials_stand_in_a_text_by_their_names_where_that_is_asked_for(tokenizer):
    named, text = Named(tokenizer), "the <extra_id_0> of<mask><mask> a <extra_id_1>"
    ids, special = named.encode(text), tokenizer.specials
    gap, mask, other = (special[name] for name in ("<extra_id_0>", "<mask>", "<extra_id_1>"))
    between = [tokenizer.encode(part) for part in ("the ", " of", " a ")]
    assert ids == [*between[0], gap, *between[1], mask, mask, *between[2], other]
    assert named.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert named.encode("") == [] and named.decode([]) == "" and named.vocab == tokenizer.vocab


def test_a_published_mask_is_found():
    wordpiece = tokenizers.train(TEXTS, SPECS["wordpiece"])
    assert Words.of(wordpiece).find("mask", MASK) == wordpiece.specials["[MASK]"]


def test_each_sign_of_a_script_without_blanks_is_a_word_and_marks_stay_with_their_letter():
    words = Words.of(tokenizers.train(text := ["the 语言 हिन्दी end"], dict(kind="characters")))
    ids = tokenizers.train(text, dict(kind="characters")).encode(text[0])
    found = [text[0][i] for i in np.flatnonzero(words.begins(ids)) if text[0][i] != " "]
    assert found == ["t", "语", "言", "ह", "e"]
