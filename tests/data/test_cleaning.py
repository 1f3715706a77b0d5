"""Cleaning rules: each keeps its promise, says why, and leaves alone what it must not touch."""

import pickle
import random

import ftfy
from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxlm import lookup
from jaxlm.data import cleaning
from jaxlm.data.cleaning import Cleaner
from jaxlm.data.contamination import contamination
from jaxlm.lookup import Mistake

PROSE = (
    "The committee met in the old town hall to speak of the budget that the mayor had sent to all of its members. "
    "It was a long evening, and those who have followed such meetings know that they end late.\n"
    "Some of the speakers wished to be heard with more patience, but the chairman asked for brevity and moved on to "
    "the next question.\nNobody left before the vote was taken, which is rare enough to be mentioned here.\n"
)


def clean(name, text, **options):
    """(text, what was done, reasons or changes)"""
    outcome = Cleaner.of([dict(name=name, **options)])(text)
    return outcome.text, outcome.steps[-1].did, dict(outcome.steps[-1].why)


def reason(name, text, **options):
    kept, did, why = clean(name, text, **options)
    assert (kept, did) == (None, "dropped"), f"{name} did not drop it"
    return next(iter(why))


OPTIONS = dict(language=dict(keep=["en"]))


@pytest.mark.parametrize("name", lookup.names("jaxlm.data.cleaning"))
def test_every_rule_keeps_prose_byte_for_byte_and_can_be_sent_to_a_worker(name):
    cleaner = pickle.loads(pickle.dumps(Cleaner.of([dict(name=name, **OPTIONS.get(name, {}))])))
    outcome = cleaner(PROSE)
    assert outcome.text == PROSE and [step.did for step in outcome.steps] == ["kept"]


@pytest.mark.parametrize("name", lookup.names("jaxlm.data.cleaning"))
@given(text=st.text(max_size=200))
def test_every_rule_answers_to_any_text_and_never_with_a_blank(name, text):
    outcome = CLEANERS[name](text)
    assert outcome.text is None or outcome.text.strip()
    assert (outcome.text is None) == (outcome.steps[-1].did == "dropped")


CLEANERS = {name: Cleaner.of([dict(name=name, **OPTIONS.get(name, {}))]) for name in lookup.names(cleaning.__name__)}


# Unicode


@pytest.mark.parametrize(
    "broken, mended",
    [
        ("The cafÃ© is open", "The café is open"),
        ("schÃ¶n und gut", "schön und gut"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("one\r\ntwo", "one\ntwo"),
        ("e\u0301t\u0301", "ét\u0301"),
        ("a\x00b\x1b[31mc\x1b[0m", "abc"),
    ],
)
def test_mojibake_entities_line_ends_and_control_signs_are_mended(broken, mended):
    assert clean("unicode", broken)[:2] == (mended, "changed")


@pytest.mark.parametrize(
    "text",
    [
        "“quoted” — and…",
        "if (a < b &amp;&amp; c)",
        "naïve Ünïcödé",
        "10³ µm",
        "漢字（かな）ＡＢＣ、ｱ",
        "a\tb\n\n  c",
        "Ã la carte"[1:],
    ],
)
def test_what_is_right_stays_as_it_is(text):
    assert clean("unicode", text) == (text, "kept", {})


@given(text=st.text(st.sampled_from("ab<>&;\n\n\r\t \x0c\x7féÃ©â€™ﬁ“&amp;\u2028\x1b[0m"), max_size=60))
def test_plain_lines_that_ftfy_is_spared_are_those_it_would_leave_alone(text):
    rule = dict(Cleaner.of(["unicode"]).rules)["unicode"]
    assert rule(text) == ftfy.fix_text(text, ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False))


def test_a_form_of_unicode_must_exist():
    with pytest.raises(
        Mistake, match=r"unicode.normalization has no 'NFX'; did you mean .* Choices: NFC, NFD, NFKC, NFKD, none"
    ):
        Cleaner.of([dict(name="unicode", normalization="NFX")])


# HTML

PAGE = (
    "<html><head><title>Budget</title><script>var x = 1;</script></head><body><nav><a href='/'>Home</a> "
    "<a href='/news'>News</a></nav><article><h1>Budget</h1>"
    + "".join(f"<p>{line}</p>" for line in PROSE.splitlines())
    + "</article><footer>Copyright. All rights reserved.</footer></body></html>"
)


def test_of_a_page_the_main_text_is_left():
    text, did, _ = clean("html", PAGE)
    assert did == "changed" and all(line in text for line in PROSE.strip().splitlines())
    assert not any(word in text for word in ("var x", "All rights", "<p>", "News"))


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "template<typename T> void f();",
        "x <- 3; y <p",
        PROSE,
        "Use <b> for bold, and <p> or <div> with care.",
        "<p> begins a paragraph, <span> part of a line.",
        "A <div class='a'> ends with </div>, and a page with </html> at last.",
    ],
)
def test_what_is_no_page_stays_as_it_is(text):
    assert clean("html", text) == (text, "kept", {})


@pytest.mark.parametrize(
    "page", [f"<!-- {PROSE} -->\n{PAGE}", f"\ufeff<!DOCTYPE html>{PAGE}", f"Date: today\n\n{PAGE}\n"]
)
def test_a_page_may_begin_with_something_else(page):
    assert clean("html", page)[1] == "changed"


def test_a_page_without_text_goes():
    assert reason("html", "<html><body><script>x()</script></body></html>") == "no main text"


# Language


def test_other_languages_go_and_are_counted_by_name():
    german = "Der Ausschuss traf sich im alten Rathaus, um über den Haushalt der Stadt zu sprechen, und es wurde spät."
    assert reason("language", german, keep=["en"]) == "de"
    assert clean("language", german, keep=["en", "de"])[1] == "kept"
    assert reason("language", "1234 5678", keep=["en"]) == "uncertain"


@pytest.mark.parametrize(
    "keep, message", [("en", "is a list, each a text, not 'en'"), ([], "is a list"), (["xx"], "has no 'xx'")]
)
def test_a_language_must_be_known(keep, message):
    with pytest.raises(Mistake, match=f"language.keep {message}"):
        Cleaner.of([dict(name="language", keep=keep)])


# Quality


@pytest.mark.parametrize(
    "text, why",
    [
        ("too short", "too few words"),
        (PROSE * 2000, "too many words"),
        ("a b " * 40, "word length"),
        ("incomprehensibilities notwithstanding " * 40, "word length"),
        ("# " * 10 + PROSE, "hash signs"),
        (PROSE + "so ... and … " * 10, "ellipses"),
        ("\n".join("- the item that is to be bought" for _ in range(10)), "bullets"),
        ("\n".join("read more of the thing and that with it..." for _ in range(10)) + PROSE, "lines end in ellipses"),
        ("12:45 13:50 14:55 total " * 20, "not alphabetic"),
        ("Lorem ipsum dolor sit amet consectetur " * 10, "no function words"),
    ],
)
def test_gopher_drops_what_is_no_prose_and_says_why(text, why):
    assert reason("gopher", text, **(dict(symbols=0.01) if why == "ellipses" else {})) == why


def test_gophers_limits_are_themselves_allowed():
    words = "the and " + "word " * 48
    assert clean("gopher", words)[1] == "kept" and reason("gopher", words[:-5]) == "too few words"
    assert clean("gopher", "kurz und gut gesagt " * 13, function_words=0)[1] == "kept"
    assert clean("gopher", "the and there", min_words=3)[1] == "kept"


def test_what_repeats_is_measured_as_the_paper_says():
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefgh", k=8)) + f" {i} x{i * 7} y{i * 11} z{i * 13} end{i}" for i in range(100)]
    assert clean("repetition", "\n".join(lines))[1] == "kept"
    assert reason("repetition", "\n".join(lines[:60] + lines[:40])) == "repeated lines"
    assert clean("repetition", "\n".join(lines[:70] + lines[:30]), line_characters=1, repeated=())[1] == "kept"
    long = [" ".join(f"{line}{i}" for i in range(9)) for line in lines[:20]]
    assert reason("repetition", "\n".join(lines + long + long)) == "characters in repeated lines"
    paragraphs = [f"{one}\n{two}" for one, two in zip(lines[::2], lines[1::2])]
    said = reason("repetition", "\n\n".join(paragraphs[:60] + paragraphs[:40]), lines=1, line_characters=1)
    assert said == "repeated paragraphs"
    assert reason("repetition", " ".join(f"buy now {i}" for i in range(50))) == "most frequent 2-gram"
    block = " ".join(f"word{i}" for i in range(20))
    assert reason("repetition", f"{block} and then {block} other {' '.join(lines[:5])}") == "repeated 5-grams"
    assert clean("repetition", f"{block} and then {block} {' '.join(lines)}")[1] == "kept"


def test_overlapping_repetitions_count_each_character_once():
    text = "ha " * 30 + " ".join(f"w{i}" for i in range(200))
    kept = dict(lines=1, line_characters=1, repeated=())
    share = 30 * 2 / (30 * 2 + sum(len(f"w{i}") for i in range(200)))
    assert reason("repetition", text, frequent=[share - 1e-9], **kept) == "most frequent 2-gram"
    assert clean("repetition", text, frequent=[share + 1e-9], **kept)[1] == "kept"


def test_c4_keeps_lines_that_are_sentences():
    page = (
        "Home | News | About us\nThis is the first sentence of the page.\nShort one.\n"
        'Please enable Javascript to go on.\nHe said that "this is the second sentence."\n'
        "We use cookies to make this page better.\n"
        "This line goes on and on...\nIs this the third sentence of it?[1]\n"
    )
    text, did, why = clean("c4", page)
    assert did == "changed" and text.splitlines() == [
        "This is the first sentence of the page.",
        'He said that "this is the second sentence."',
        "Is this the third sentence of it?",
    ]
    assert why == {
        "line ends in no mark": 2,
        "short line": 1,
        "line on Javascript": 1,
        "line on policies": 1,
        "citation": 1,
    }


@pytest.mark.parametrize(
    "text, options, why",
    [
        (PROSE + "function f() { return 1; }", {}, "brace"),
        (PROSE + "Lorem Ipsum dolor sit amet.", {}, "lorem ipsum"),
        ("One sentence is all that there is.", {}, "too few sentences"),
        (PROSE, dict(banned=["mayor"]), "banned word"),
    ],
)
def test_c4_drops_pages_and_says_why(text, options, why):
    assert reason("c4", text, **options) == why


def test_c4_bans_whole_words_only():
    assert clean("c4", PROSE, banned=["may", "committees"])[1] == "kept"


def test_length_limits_are_themselves_allowed():
    assert clean("length", "abc de", min_characters=6, max_characters=6, min_words=2, max_words=2)[1] == "kept"
    for limits, why in [
        (dict(min_characters=7), "too few characters"),
        (dict(max_characters=5), "too many characters"),
        (dict(min_words=3), "too few words"),
        (dict(max_words=1), "too many words"),
    ]:
        assert reason("length", "abc de", **limits) == why


# Contamination


def test_a_run_of_words_shared_with_an_evaluation_set_is_found_and_named(tmp_path):
    words = [f"word{i}" for i in range(40)]
    (tmp_path / "quiz.txt").write_text(" ".join(words) + "\n" + "only five words in this\n")
    (tmp_path / "other.txt").write_text(" ".join(reversed(words)))
    sets = dict(quiz=f"text:{tmp_path}/quiz.txt?documents=line", other=f"text:{tmp_path}/other.txt")
    rule = contamination(sets)
    cleaner = Cleaner().then("decontaminate", pickle.loads(pickle.dumps(rule)))
    thirteen = "Before: " + ", ".join(words[5:18]).upper() + "!"
    assert cleaner(thirteen).steps[0].why == {"quiz": 1} and "1 runs of 13" in cleaner(thirteen).steps[0].detail
    assert cleaner(" ".join(reversed(words[3:30]))).steps[0].why == {"other": 1}
    assert cleaner("before " + " ".join(words[5:17]) + " after").text  # twelve in a row
    assert cleaner(" ".join([*words[5:11], "break", *words[11:22]])).text
    assert cleaner("only five words in this").text
    assert rule.recipe["sources"]["quiz"]["short"] == 1
    with pytest.raises(Mistake, match="no text of quiz has 50 words"):
        contamination(sets, ngram=50)


# The pipeline


def test_own_filters_are_named_by_dots_and_answer_in_any_way_that_is_one():
    own = "tests.data.own_filters"
    cleaner = Cleaner.of([f"{own}.keep", dict(name=f"{own}.keep", word="worse"), f"{own}.count", f"{own}.shout"])
    assert cleaner("axb").text == "AB"
    assert cleaner("bad").steps[-1] == cleaning.Step(f"{own}.keep", "dropped", {"unwanted": 1}, "", 3)
    assert cleaner("worse").steps[-1].rule == f"{own}.keep#2"
    assert cleaner("x" * 200).steps[-1][1:4] == ("dropped", {"long": 1}, "200")
    assert cleaner("xx").steps[-1].why == {"nothing left": 1}
    assert pickle.loads(pickle.dumps(cleaner))("axb").text == "AB"
    with pytest.raises(Mistake, match=r"own_filters.broken answered with int"):
        Cleaner.of([f"{own}.broken"])("a")


@pytest.mark.parametrize(
    "entries, message",
    [
        (["gofer"], r"has no 'gofer'; did you mean 'gopher'\? Choices: c4, gopher"),
        ([dict(name="gopher", min_word=3)], r"clean: gopher has no 'min_word'; did you mean 'min_words'"),
        (["language"], r"clean: language needs 'keep'"),
        ([dict(min_words=3)], "has no name; choices: c4"),
        ("gopher", "is a list of rules"),
        (dict(name="gopher"), "is a list of rules"),
        (["no.such.module.f"], "no module 'no'.*PYTHONPATH"),
        (["tests.data.own_filters.kept"], "has no 'kept'; did you mean 'keep'"),
        (["tests.data.own_filters.LIMIT"], "has no 'LIMIT'"),
        ([dict(name="tests.data.own_filters.keep", wort="a")], "has no 'wort'; did you mean 'word'"),
        (["tests.data.own_filters.required"], "needs 'word'"),
    ],
)
def test_a_rule_or_key_that_does_not_exist_is_refused(entries, message):
    with pytest.raises(Mistake, match=message):
        Cleaner.of(entries)


def test_counts_add_up_from_rule_to_rule():
    entries = ["unicode", dict(name="length", min_words=3), "pii", "tests.data.own_filters.keep"]
    cleaner = Cleaner.of(entries)
    texts = [
        "a bad one",
        "cafÃ© au lait",
        "short",
        "mail joe@x.org now",
        "nothing to see",
        "bad @ joe@x.org and ann@x.org",
    ]
    outcomes = [cleaner(text) for text in texts]
    counts = sum((outcome.counts for outcome in outcomes), start=outcomes[0].counts.__class__())
    report, left, size = cleaner.report(counts), len(texts), sum(len(text.encode()) for text in texts)
    for numbers in report.values():
        assert numbers["kept"] + numbers["changed"] + numbers["dropped"] == left
        assert numbers["dropped"] == sum(numbers["reasons"].values())
        left, size = left - numbers["dropped"], size - numbers["bytes_removed"]
    assert left == 3 and size == sum(len(o.text.encode()) for o in outcomes if o.text)
    assert report["pii"]["changes"] == {"email": 3} and report["length"]["reasons"] == {"too few words": 1}


def test_the_recipe_names_every_option_and_notices_another_filter():
    recipe = Cleaner.of(["length", dict(name="c4", banned=("a",)), "tests.data.own_filters.keep"]).recipe
    assert recipe[0] == dict(name="length", min_characters=1, max_characters=None, min_words=0, max_words=None)
    assert recipe[1]["banned"] == ["a"] and recipe[1]["min_words"] == 5
    assert len(recipe[2]["source"]) == 16
    assert recipe[2:] != Cleaner.of(["tests.data.own_filters.shout"]).recipe, "another filter of the same module"


def test_a_filter_s_helpers_belong_to_its_recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, bad in enumerate(("one", "two")):
        text = f"BAD = {bad!r}\n\ndef _in(text):\n    return BAD in text\n\ndef keep(text):\n    return not _in(text)\n"
        (tmp_path / f"helped{number}.py").write_text(text)
        found += Cleaner.of([f"helped{number}.keep"]).recipe
    assert found[0]["source"] != found[1]["source"]
