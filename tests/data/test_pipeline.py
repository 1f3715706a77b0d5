"""`jaxlm prepare` with rules, deduplication, decontamination: documents are accounted for, kills change nothing."""

import json
import random

import pytest

from jaxlm import prepare as program
from jaxlm.data import encode, pipeline, sources
from jaxlm.data.splits import Splitter
from jaxlm.lookup import Mistake
from jaxlm.prepare import prepare

BYTES = dict(kind="bytes")
RULES = dict(
    clean=[
        "unicode",
        dict(name="length", min_words=8),
        "pii",
        dict(name="tests.data.own_filters.keep", word="forbidden"),
    ],
    dedup=dict(near=0.7, permutations=64),
)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def read(made, source, split="train"):
    part, tokenizer = made.split(source, split), made.tokenizer()
    return [tokenizer.decode(part.document(i)) for i in range(len(part))]


def write(path, texts):
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    return f"jsonl:{path}"


@pytest.fixture
def corpus(tmp_path):
    """Two sources of dirty, forbidden and short texts, copies and edited copies, within and across; and a quiz."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    quiz = " ".join(rng.choices(words, k=40))

    def edited(text):
        parts = text.split()
        parts[rng.randrange(len(parts))] = "edited"
        return " ".join(parts)

    def text(i):
        body = " ".join(rng.choices(words, k=60))
        return ["cafÃ© " + body, "forbidden " + body, "short", f"{body} joe{i}@x.org", f"{body} {quiz}", body, body][
            i % 7
        ]

    one, other = [text(i) for i in range(100)], [text(i) for i in range(60)]
    one += [text.upper() for text in one[:12]] + [edited(text) for text in one[20:40]] + one[20:25]
    other += [edited(text) for text in one[40:60]] + one[60:70]
    rng.shuffle(other)
    quiz = write(tmp_path / "quiz.jsonl", [quiz])
    found = dict(one=write(tmp_path / "one.jsonl", one), other=write(tmp_path / "other.jsonl", other))
    return found, dict(RULES, decontaminate=dict(sources=dict(quiz=quiz)), validation=0.3)


@pytest.fixture
def small(monkeypatch):
    """Small batches, parts and commits, so that a small corpus takes many of each."""
    monkeypatch.setattr(encode, "BATCH", 2_000)
    monkeypatch.setattr(encode, "BESIDE", 0)
    monkeypatch.setattr(program, "COMMIT", 3_000)
    monkeypatch.setattr(pipeline, "PART", 30_000)


def test_every_document_read_is_kept_or_counted_by_what_left_it_out(corpus, tmp_path):
    found, rules = corpus
    made = prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    for source, total in (("one", 137), ("other", 90)):
        manifest = made.manifest(source)
        left = manifest["read"]
        assert left == total
        for numbers in manifest["cleaning"].values():
            assert numbers["kept"] + numbers["changed"] + numbers["dropped"] == left
            left -= numbers["dropped"]
        duplicates = manifest["duplicates"]
        assert left - sum(duplicates.values()) == sum(s["documents"] for s in manifest["splits"].values())
        assert duplicates["near"] >= 10 and duplicates["exact"] >= 5
        assert manifest["cleaning"]["decontaminate"]["reasons"] == {
            "quiz": manifest["cleaning"]["decontaminate"]["dropped"]
        }
    texts = [text for source in found for split in ("train", "validation") for text in read(made, source, split)]
    assert not [text for text in texts if "forbidden" in text or "Ã" in text or "@" in text or text == "short"]


def test_no_document_has_a_near_duplicate_on_the_other_side_or_in_another_source(corpus, tmp_path):
    found, rules = corpus
    made = prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    texts = [text for source in found for split in ("train", "validation") for text in read(made, source, split)]
    sets = [set(zip(*(text.casefold().split()[i:] for i in range(5)))) for text in texts]
    worst = max(len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i])
    assert worst < 0.7 and len(texts) > 80


def test_the_store_is_the_same_for_any_number_of_workers(corpus, small, tmp_path):
    found, rules = corpus
    for workers in (1, 2):
        prepare(f"{tmp_path}/{workers}", found, dict(kind="huggingface", vocab=300), workers=workers, **rules)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert not [name for name in contents(tmp_path / "1") if "selection" in name]


class Killed(BaseException):
    """The machine went away."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_write_it_ends_in_the_very_same_bytes(moment, corpus, small, tmp_path, monkeypatch):
    found, rules = corpus
    prepare(f"{tmp_path}/straight", found, BYTES, workers=1, **rules)
    written, kills = [], 0

    def dying(write):
        def write_and_die(path, content):
            if moment == "after":
                write(path, content)
            written.append(path.name)
            if len(written) % 4 == 0:
                raise Killed
            if moment == "before":
                write(path, content)

        return write_and_die

    monkeypatch.setattr(program, "write_json", dying(program.write_json))
    monkeypatch.setattr(pipeline, "_write", dying(pipeline._write))
    for _ in range(100):
        try:
            prepare(f"{tmp_path}/killed", found, BYTES, workers=1, **rules)
            break
        except Killed:
            kills += 1
    assert kills > 4 and {"verdicts.npz", "manifest.json", "progress.json"} <= set(written)
    assert len([name for name in set(written) if name.startswith("part-")]) > 2
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")


def test_killed_while_parts_are_removed_it_looks_again(corpus, small, tmp_path):
    found, rules = corpus
    made = prepare(f"{tmp_path}/both", found, BYTES, workers=1, **rules)
    folder = tmp_path / "store" / "one" / "selection"
    prepare(f"{tmp_path}/store", dict(one=found["one"]), BYTES, workers=1, **rules)
    folder.mkdir()
    (folder / "part-000000000005.npz").write_bytes(b"left over")
    joined = prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    assert read(joined, "other") == read(made, "other") and not folder.exists()


def test_a_source_that_joins_later_is_compared_with_those_that_were_there(corpus, tmp_path):
    found, rules = corpus
    prepare(f"{tmp_path}/both", found, BYTES, workers=1, **rules)
    prepare(f"{tmp_path}/joined", dict(one=found["one"]), BYTES, workers=1, **rules)
    before = contents(tmp_path / "joined" / "one")
    prepare(f"{tmp_path}/joined", found, BYTES, workers=1, **rules)
    assert contents(tmp_path / "joined" / "one") == before
    assert contents(tmp_path / "joined" / "other") == contents(tmp_path / "both" / "other")


def test_the_first_source_by_name_wins_or_the_preferred_one(corpus, tmp_path):
    text = "one and the same text"
    specs = dict(b=write(tmp_path / "b.jsonl", [text, "b"]), a=write(tmp_path / "a.jsonl", [text, "a"]))
    for prefer, a, b in ([], [text, "a"], ["b"]), (["b"], ["a"], [text, "b"]):
        made = prepare(f"{tmp_path}/{prefer}", specs, BYTES, validation=0, workers=1, dedup=dict(prefer=prefer))
        assert (read(made, "a"), read(made, "b")) == (a, b)
    with pytest.raises(Mistake, match="prefer has no 'c'"):
        prepare(f"{tmp_path}/c", specs, BYTES, workers=1, dedup=dict(prefer=["c"]))


def test_another_rule_order_or_set_asks_for_another_store(corpus, tmp_path):
    found, rules = corpus

    def run(**changes):
        return prepare(f"{tmp_path}/store", found, BYTES, workers=1, **(rules | changes))

    run()
    more = [*rules["clean"], "gopher"]
    for changes, message in [
        (dict(clean=more), r"clean: \[.* now"),
        (dict(clean=()), r"clean: \[.* there, None now"),
        (dict(dedup=dict(near=0.8, permutations=64)), "dedup: .*0.7.* there, .*0.8.* now"),
        (dict(dedup=None), "dedup: .* there, None now"),
        (dict(decontaminate=None), "decontaminate: .* there, None now"),
        (dict(dedup=dict(rules["dedup"], prefer=["other"])), r"after: \[\] there, \['other'\] now"),
    ]:
        with pytest.raises(Mistake, match=message):
            run(**changes)


def test_killed_while_it_looks_for_duplicates_another_rule_is_refused(corpus, tmp_path, monkeypatch):
    found, rules = corpus
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decide", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    with pytest.raises(Mistake, match=r"one was made differently .*clean"):
        prepare(f"{tmp_path}/store", found, BYTES, workers=1, **(rules | dict(clean=["unicode"])))
    prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    prepare(f"{tmp_path}/store", found, BYTES, workers=1, **(rules | dict(clean=["unicode"])), overwrite=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(clean=["gofer"]), "did you mean 'gopher'"),
        (dict(clean=[dict(name="gopher", min_wrds=3)]), "did you mean 'min_words'"),
        (dict(dedup=dict(nears=0.8)), "config.prepare.dedup has no 'nears'; did you mean 'near'"),
        (dict(decontaminate=dict(ngrams=13, sources={})), "config.prepare.decontaminate has no 'ngrams'"),
        (dict(decontaminate=dict(ngram=13)), "config.prepare.decontaminate needs 'sources'"),
    ],
)
def test_a_rule_or_key_that_does_not_exist_is_refused_before_anything_is_read(wrong, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        prepare(f"{tmp_path}/store", dict(a=f"text:{tmp_path}/none.txt"), BYTES, **wrong)
    assert not (tmp_path / "store").exists()


def test_texts_that_are_equal_once_they_are_clean_are_on_the_same_side(tmp_path):
    dirty = [f"the cafÃ© number {i}" for i in range(40)]
    spec = write(tmp_path / "a.jsonl", dirty + [text.replace("Ã©", "é") for text in dirty])
    made = prepare(f"{tmp_path}/store", dict(a=spec), BYTES, validation=0.5, clean=["unicode"], workers=1)
    train, held_out = read(made, "a"), read(made, "a", "validation")
    assert len(train) + len(held_out) == 80 and len(set(train)) * 2 == len(train) and not set(train) & set(held_out)


def test_the_tail_is_that_of_the_clean_text(tmp_path):
    spec = write(tmp_path / "a.jsonl", ["x" * 50 + "abcdefghij"])
    rules = dict(clean=["tests.data.own_filters.count"], validation=0.2, split="tail")
    made = prepare(f"{tmp_path}/store", dict(a=spec), BYTES, workers=1, **rules)
    assert (read(made, "a"), read(made, "a", "validation")) == (["abcdefgh"], ["ij"])


def test_the_tokenizer_sees_neither_what_was_dropped_nor_what_was_changed(corpus, tmp_path):
    spec = write(tmp_path / "a.jsonl", ["abc " * 10, "forbidden Q " * 10, "abc Ã© joe@x.org " * 3])
    made = prepare(
        f"{tmp_path}/store", dict(a=spec), dict(kind="characters"), workers=1, validation=0, clean=RULES["clean"]
    )
    with pytest.raises(Mistake, match="the character 'Q' is not among"):
        made.tokenizer().encode("Q")
    assert made.tokenizer().encode("é <EMAIL>")
    with pytest.raises(Mistake, match="the character '@' is not among"):
        made.tokenizer().encode("@")


def test_pieces_of_a_long_document_are_texts_of_their_own_to_rules_and_stay_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    long = "".join(f"line {i} of a long text\n" * 2 + ("forbidden\n" if i == 9 else "") for i in range(20))
    spec = write(tmp_path / "a.jsonl", [long, *(f"another text of some words, number {i}" for i in range(9))])
    keep = dict(name="tests.data.own_filters.keep", word="forbidden")
    for seed in range(6):
        rules = dict(clean=[keep], dedup=dict(near=None), split_seed=seed, validation=0.5)
        made = prepare(f"{tmp_path}/{seed}", dict(a=spec), BYTES, workers=1, **rules)
        sides = {split: "".join(t for t in read(made, "a", split) if "line" in t) for split in ("train", "validation")}
        assert sorted(map(bool, sides.values())) == [False, True]
        text = "".join(sides.values())
        assert "forbidden" not in text and "line 2 " in text and "line 19" in text and len(text) > 0.8 * len(long)
        assert made.manifest("a")["cleaning"]["tests.data.own_filters.keep"]["dropped"] == 1


def test_a_source_of_which_nothing_stays_says_what_left_it_out(tmp_path):
    spec = write(tmp_path / "a.jsonl", ["one text", "ONE text", "short"])
    rules = dict(clean=[dict(name="length", min_words=2)], dedup={})
    with pytest.raises(
        Mistake, match=r"b: .* leaves nothing to train on .*length: too few words': 1, 'exact duplicate': 2"
    ):
        prepare(f"{tmp_path}/store", dict(a=spec, b=spec), BYTES, workers=1, validation=0, **rules)


def test_a_source_that_changes_between_two_passes_is_noticed(corpus, tmp_path, monkeypatch):
    found, rules = corpus
    with monkeypatch.context() as patch:
        patch.setattr(program, "_tokenizer", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    monkeypatch.setattr("jaxlm.data.files.inputs", lambda names: dict(files=1))
    with pytest.raises(Mistake, match=r"made differently .*inputs"):
        prepare(f"{tmp_path}/store", found, BYTES, workers=1, **rules)
    selection = pipeline.load(program.epath.Path(tmp_path / "store" / "one" / "selection"))
    assert selection
    with pytest.raises(Mistake, match="another number of documents than the 137"):
        list(selection.of([None] * 136))
    with pytest.raises(Mistake, match="another number of documents than the 137"):
        list(selection.of([None] * 138))


def test_explain_shows_the_same_sample_every_time_and_makes_nothing(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found, rules = corpus
    config = tmp_path / "config.py"
    section = dict(sources=found, tokenizer=BYTES, **rules)
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(dict(store='', prepare={section!r}))\n"
    )
    flags = [f"--config={config}", f"--config.store={tmp_path}/store", "--explain=30"]
    program.main(flags)
    said = capsys.readouterr().out
    program.main(flags)
    assert capsys.readouterr().out == said and not (tmp_path / "store").exists()
    for words in (
        "too few words: 1 words, 8 at least",
        "unwanted",
        "email 1 x",
        "quiz: 28 runs of 13 words",
        "-2 bytes",
    ):
        assert words in said, words
    program.main([*flags[:2], "--explain"])
    shorter = capsys.readouterr().out
    assert 0 < shorter.count("unicode") < said.count("unicode")
    with pytest.raises(Mistake, match="did you mean 'dedup'"):
        program.main([*flags, "--config.prepare.dedupe=1"])
    with pytest.raises(Mistake, match="names no rule to explain"):
        program.main([*flags, "--config.prepare.clean=[]", "--config.prepare.decontaminate=None"])


@pytest.mark.parametrize("clean", [(), ("pii",)], ids=["as it is", "scrubbed"])
def test_a_rule_that_changes_text_hides_no_contamination(tmp_path, clean):
    ask = "Please write to john.smith@example.com and ask for the new printed catalogue of the second half"
    (tmp_path / "exam.txt").write_text(f"{ask} spring")
    found = pipeline.Pipeline.of(
        Splitter("document", 0.0, 0), clean, decontaminate=dict(sources=dict(e=f"text:{tmp_path}/exam.txt"))
    )
    assert found.cleaner(ask).text is None and found.cleaner("Please write to john.smith@example.com").text


def test_another_version_of_a_library_whose_rules_are_used_is_another_recipe(tmp_path, monkeypatch):
    spec, how = write(tmp_path / "a.jsonl", ["one text", "another text"]), dict(workers=1, validation=0)
    for name, rules, library in [
        ("unicode", dict(clean=["unicode"]), "ftfy"),
        ("language", dict(clean=[dict(name="language", keep=["en"], confidence=0.0)]), "py3langid"),
        ("dedup", dict(dedup={}), "rensa"),
    ]:
        made = prepare(f"{tmp_path}/{name}", dict(a=spec), BYTES, **how, **rules)
        version = made.manifest("a")["libraries"][library]
        prepare(f"{tmp_path}/{name}", dict(a=spec), BYTES, **how, **rules)
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", lambda library: "0.0.1")
            with pytest.raises(Mistake, match=rf"libraries: .*'{library}': '{version}'.* there, .*'0.0.1'.* now"):
                prepare(f"{tmp_path}/{name}", dict(a=spec), BYTES, **how, **rules)
    assert prepare(f"{tmp_path}/plain", dict(a=spec), BYTES, **how).manifest("a")["libraries"] is None
