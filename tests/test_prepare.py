"""`jaxlm prepare`: whole texts in, the same store out, however often it is killed and however many workers help."""

import json
import os

import pytest

from jaxlm import prepare as program
from jaxlm.data import encode, splits, store, tokenizers
from jaxlm.data.cleaning import Cleaner
from jaxlm.data.sources import Document
from jaxlm.lookup import Mistake, spend
from jaxlm.prepare import prepare

BYTES = dict(kind="bytes")


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def read(split, tokenizer):
    return [tokenizer.decode(split.document(i)) for i in range(len(split))]


@pytest.fixture
def corpus(tmp_path):
    """Two hundred short documents, one of them twice."""
    texts = [f"document {i}: " + "naïve words, " * (i % 7) for i in range(199)]
    lines = [json.dumps(dict(text=text)) for text in [*texts, texts[3]]]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    return [*texts, texts[3]]


@pytest.fixture
def small(monkeypatch):
    """Small batches and frequent commits, so that a small corpus takes many of both."""
    monkeypatch.setattr(encode, "BATCH", 500)
    monkeypatch.setattr(encode, "BESIDE", 0)
    monkeypatch.setattr(program, "COMMIT", 800)


def test_every_document_comes_back_whole_and_in_order(corpus, tmp_path):
    made = prepare(f"{tmp_path}/store", dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES, validation=0.2, workers=1)
    train, held_out = made.split("docs", "train"), made.split("docs", "validation")
    kept, held = read(train, made.tokenizer()), read(held_out, made.tokenizer())
    assert sorted(kept + held) == sorted(corpus) and kept == [text for text in corpus if text in set(kept)]
    assert 20 < len(held) < 60 and not set(kept) & set(held)
    assert train.bytes.tolist() == [len(text.encode()) for text in kept]
    assert train.document(0)[0] == made.tokenizer().bos and train.document(0)[-1] == made.tokenizer().eos
    sizes = made.manifest("docs")["splits"]
    assert sizes["train"] == dict(documents=len(kept), tokens=train.tokens_count, bytes=int(train.bytes.sum()))


def test_the_store_is_the_same_for_any_number_of_workers(corpus, small, tmp_path):
    spec = dict(kind="huggingface", vocab=300)
    for workers in (1, 2, 3):
        prepare(
            f"{tmp_path}/{workers}", dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), spec, validation=0.2, workers=workers
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


class Killed(BaseException):
    """The machine went away."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_commit_it_ends_in_the_very_same_bytes(moment, corpus, small, tmp_path, monkeypatch, capsys):
    arguments = dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), dict(kind="characters")
    made = dict(validation=0.2, workers=1)
    prepare(f"{tmp_path}/straight", *arguments, **made)
    write, written, kills = store.write_json, [], 0

    def write_and_die(path, content):
        if moment == "after":
            write(path, content)
        written.append(str(path))
        if len(written) % 2 == 0:
            raise Killed
        if moment == "before":
            write(path, content)

    monkeypatch.setattr(program, "write_json", write_and_die)
    for _ in range(60):
        try:
            prepare(f"{tmp_path}/killed", *arguments, **made)
            break
        except Killed:
            kills += 1
    assert kills > 4 and any("manifest" in path for path in written)
    assert "going on after" in capsys.readouterr().out
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")


def test_prepared_already_it_says_so_and_does_nothing(corpus, tmp_path, capsys):
    def run():
        prepare(f"{tmp_path}/store", dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES, workers=1)

    run()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    capsys.readouterr()
    run()
    assert capsys.readouterr().out.startswith("docs: already prepared, train ")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}


def test_prepared_differently_it_says_what_differs_and_what_to_do(corpus, tmp_path):
    def run(spec="", tokenizer=BYTES, **options):
        return prepare(
            f"{tmp_path}/store", dict(docs=f"jsonl:{tmp_path}/docs.jsonl{spec}"), tokenizer, workers=1, **options
        )

    run()
    for change, message in [
        (dict(validation=0.1), r"validation: 0.05 there, 0.1 now\); .* --overwrite"),
        (dict(split="tail"), "split: 'document' there, 'tail' now"),
        (dict(split_seed=1), "split_seed: 0 there, 1 now"),
        (dict(spec="?field=text"), r"source: .*docs.jsonl' there, .*field=text' now"),
        (
            dict(tokenizer=dict(kind="characters")),
            "tokenizer was made differently .*kind: 'bytes' there, 'characters' now",
        ),
    ]:
        with pytest.raises(Mistake, match=message):
            run(**change)
    run(validation=0.1, overwrite=True)
    assert run(validation=0.1).manifest("docs")["validation"] == 0.1
    with (tmp_path / "docs.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(Mistake, match=r"inputs: .* there, .* now"):
        run(validation=0.1)


def test_nothing_that_is_no_store_is_ever_removed(corpus, tmp_path):
    with pytest.raises(Mistake, match="is not empty and no token store"):
        prepare(str(tmp_path), dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES, overwrite=True)
    assert (tmp_path / "docs.jsonl").exists()
    run = tmp_path / "run"  # a workdir has a tokenizer, as a store has
    for name in ("tokenizer", "checkpoints"):
        (run / name).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(Mistake, match=r"run is the workdir of a run: it has config\.json"):
            prepare(str(run), dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES, overwrite=overwrite)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "tokenizer"]
    assert not list((run / "tokenizer").iterdir())


def test_sources_share_a_tokenizer_trained_on_both_and_later_ones_join(corpus, tmp_path):
    (tmp_path / "more.txt").write_text("zzz\n" * 50)
    both = dict(docs=f"jsonl:{tmp_path}/docs.jsonl", more=f"text:{tmp_path}/more.txt?documents=line")
    made = prepare(f"{tmp_path}/store", both, dict(kind="characters"), workers=1, validation=0)
    assert made.sources == ["docs", "more"] and "z" in read(made.split("more", "train"), made.tokenizer())[0]
    assert made.manifest("docs")["tokenizer"] == made.manifest("more")["tokenizer"] == made.tokenizer().fingerprint
    (tmp_path / "last.txt").write_text("zone")
    joined = prepare(
        f"{tmp_path}/store", both | dict(last=f"text:{tmp_path}/last.txt"), dict(kind="characters"), validation=0
    )
    assert joined.sources == ["docs", "last", "more"] and joined.tokenizer().vocab == made.tokenizer().vocab


def test_the_tokenizer_never_sees_the_validation_split(tmp_path):
    (tmp_path / "a.txt").write_text("abcabcabcX")
    with pytest.raises(Mistake, match=r"the character 'X' is not among the 3"):
        prepare(
            f"{tmp_path}/a", dict(a=f"text:{tmp_path}/a.txt"), dict(kind="characters"), split="tail", validation=0.1
        )
    (tmp_path / "b.txt").write_text("abcabcabca")
    made = prepare(
        f"{tmp_path}/b", dict(a=f"text:{tmp_path}/b.txt"), dict(kind="characters"), split="tail", validation=0.1
    )
    assert [made.split("a", s).tokens_count for s in ("train", "validation")] == [9, 1]


def test_a_tokenizer_from_a_path_is_used_as_it_is(corpus, tmp_path):
    sources = dict(docs=f"jsonl:{tmp_path}/docs.jsonl")
    first = prepare(f"{tmp_path}/a", sources, dict(kind="sentencepiece", algorithm="bpe", vocab=300), workers=1)
    path = f"{tmp_path}/a/tokenizer/tokenizer.model"
    second = prepare(f"{tmp_path}/b", sources, dict(kind="sentencepiece", path=path, add_eos=False), workers=1)
    assert second.tokenizer().fingerprint != first.tokenizer().fingerprint
    longer, shorter = (made.split("docs", "train").document(5).tolist() for made in (first, second))
    assert longer == [*shorter, first.tokenizer().eos]


def test_what_was_skipped_and_cut_is_in_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.PIECE", 100)
    long = "a line of a long document\n" * 20
    (tmp_path / "a.jsonl").write_text(
        "\n".join([json.dumps(dict(text=long)), "{", '{"text": ""}', '{"text": "b"}', "[]"])
    )
    spec = f"jsonl:{tmp_path}/a.jsonl?on_error=skip"
    made = prepare(f"{tmp_path}/store", dict(a=spec), BYTES, validation=0, workers=1)
    manifest = made.manifest("a")
    assert manifest["skipped"] == {"bad JSON": 2, "empty": 1} and manifest["cut"] == 1
    assert "".join(read(made.split("a", "train"), made.tokenizer())) == long + "b"


def test_an_empty_corpus_is_a_mistake_and_does_not_spoil_the_others(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("text")
    sources = dict(b=f"text:{tmp_path}/b.txt", a=f"text:{tmp_path}/a.txt")
    with pytest.raises(Mistake, match=r"no text to train a tokenizer on in text:"):
        prepare(f"{tmp_path}/a", dict(a=sources["a"]), BYTES, workers=1)
    with pytest.raises(Mistake, match=r"a: text:.* leaves nothing to train on .*'empty': 1"):
        prepare(f"{tmp_path}/b", sources, BYTES, workers=1)
    with pytest.raises(Mistake, match="no token store at"):
        store.open(f"{tmp_path}/a")
    assert store.open(f"{tmp_path}/b").sources == ["b"]


def test_too_few_documents_to_hold_one_out_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document")
    prepare(f"{tmp_path}/store", dict(a=f"text:{tmp_path}/a.txt"), BYTES, validation=0.01, workers=1)
    assert "no document fell into validation; with so few, split='tail'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer", "a/b", "", ".."])
def test_a_sources_name_must_be_a_folders(name, tmp_path):
    with pytest.raises(Mistake, match="cannot be a source's name"):
        prepare(f"{tmp_path}/store", {name: "python-docs:"}, BYTES)


def test_work_is_done_here_until_others_have_started_and_comes_in_order(monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 1)
    documents = [splits.Marked(Document(str(i), 0, len(str(i))), None) for i in range(300)]
    done = list(encode.ordered(_where, iter(documents), workers=2))
    assert [read for read, _ in done] == [*range(1, 301)]
    assert [text for _, (_, text) in done] == [str(i) for i in range(300)]
    by = [pid == os.getpid() for _, (pid, _) in done]
    here = by.index(False)
    assert encode.ALONE <= here <= encode.ALONE + encode.BESIDE and all(by[:here]) and not any(by[here:])


def _where(batch):
    return os.getpid(), batch[0].document.text


def test_a_mistake_in_a_worker_comes_through(corpus, tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("abc")
    prepare(f"{tmp_path}/store", dict(a=f"text:{tmp_path}/train.txt"), dict(kind="characters"), workers=1, validation=0)
    sources = dict(docs=f"jsonl:{tmp_path}/docs.jsonl")
    for name in ("ALONE", "BESIDE"):
        monkeypatch.setattr(encode, name, 0)
    with pytest.raises(Mistake, match=r"the character 'd' is not among the 3"):
        prepare(f"{tmp_path}/store", sources, dict(kind="characters"), workers=2, validation=0)


def test_the_command_prepares_what_the_config_says(corpus, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    return ConfigDict(dict(store='', prepare=dict(sources=dict(docs='jsonl:{tmp_path}/docs.jsonl'),\n"
        "        tokenizer=dict(kind='bytes'), validation=0.1)))\n"
    )
    flags = [f"--config={config}", f"--config.store={tmp_path}/store", "--workers=1"]
    program.main(flags)
    assert store.open(f"{tmp_path}/store").manifest("docs")["validation"] == 0.1
    with pytest.raises(Mistake, match=r"validation: 0.1 there, 0.2 now"):
        program.main([*flags, "--config.prepare.validation=0.2"])
    for flag in ("--workers=-1", "--show=-1", "--explain=-1"):
        with pytest.raises(Mistake, match=f"{flag} is a number from 0 up"):
            program.main([*flags, flag])
    program.main([*flags, "--config.prepare.validation=0.2", "--overwrite"])
    assert "tokens/s" in capsys.readouterr().out


def test_the_rows_of_a_config_are_shown_as_its_model_gets_them(corpus, tmp_path, capsys):
    from tests.runs import CONFIG

    def show(*flags, made="store"):
        program.main([f"--config={tmp_path}/config.py", f"--config.store={tmp_path}/{made}", "--show=3", *flags])
        return capsys.readouterr().out.partition("row 0")[2]

    (tmp_path / "config.py").write_text(CONFIG)
    prepare(f"{tmp_path}/store", dict.fromkeys(("prose", "lists"), f"jsonl:{tmp_path}/docs.jsonl"), BYTES, workers=1)
    shown = show()
    assert shown.count("tokens  [1]") == 3 and "[2]" in show("--config.data.packing=split")
    with pytest.raises(Mistake, match="did you mean 'best_fit'"):
        show("--config.data.packing=bestfit")
    with pytest.raises(Mistake, match="no token store at"):
        show(made="nowhere")


def test_without_a_bos_the_first_token_is_given_and_its_bytes_are_no_part_of_what_is_predicted(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("éa", "bcd", "d")))
    made = prepare(f"{tmp_path}/store", dict(a=f"jsonl:{tmp_path}/a.jsonl"), dict(kind="characters"), validation=0)
    assert made.split("a", "train").bytes.tolist() == [3, 3, 1]
    assert made.predicted_bytes("a", "train") == 1 + 2 + 0
    assert made.predicted_bytes("a", "train", [0, 2]) == 1
    began = prepare(f"{tmp_path}/bos", dict(a=f"jsonl:{tmp_path}/a.jsonl"), dict(kind="bytes"), validation=0)
    assert began.predicted_bytes("a", "train") == 3 + 3 + 1


def test_a_source_left_unfinished_and_no_longer_named_is_a_mistake_with_two_ways_out(corpus, tmp_path):
    made = f"{tmp_path}/store"
    docs = dict(docs=f"jsonl:{tmp_path}/docs.jsonl")
    prepare(made, docs, BYTES, workers=1)
    (tmp_path / "store" / "old" / "train").mkdir(parents=True)
    for look in (lambda: prepare(made, docs, BYTES, workers=1), lambda: store.open(made)):
        with pytest.raises(Mistake, match=r"old.* or remove .*store/old"):
            look()
    (tmp_path / "store" / "old" / "train").rmdir()
    (tmp_path / "store" / "old").rmdir()
    assert prepare(made, docs, BYTES, workers=1).sources == ["docs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(store="HERE/docs.jsonl/store"), r"docs.jsonl/store: .*docs.jsonl is a file; a store is a folder"),
        (dict(store="HERE/docs.jsonl"), r"docs.jsonl is a file; a store is a folder"),
        (dict(sources={}), r"config.prepare.sources is empty; name texts, for example sources=dict\(docs="),
        (dict(sources={"card.html": "python-docs:"}), r"'card.html' cannot be a source's name"),
        (dict(validation="0.1"), r"validation is a fraction from 0 to below 1, not '0.1'"),
        (
            dict(clean=["tests.data.own_filters.crash"]),
            r"docs: .*own_filters.crash failed with IndexError .*'document 0: '",
        ),
        (dict(augment=[dict(name="eda", synonyms="HERE/latin.txt")]), r"synonyms=.*latin.txt, line 2 is not UTF-8"),
    ],
)
def test_what_cannot_be_prepared_is_a_mistake_that_names_it(corpus, tmp_path, changes, message):
    (tmp_path / "latin.txt").write_bytes("big, large\ncaf\u00e9, bar\n".encode("latin-1"))
    how = dict(store="HERE/store", sources=dict(docs="jsonl:HERE/docs.jsonl"), tokenizer=BYTES, workers=1) | changes
    filled = json.loads(json.dumps(how).replace("HERE", str(tmp_path)))
    with pytest.raises(Mistake, match=message):
        prepare(filled.pop("store"), filled.pop("sources"), filled.pop("tokenizer"), **filled)


def test_an_augmentation_may_be_named_alone(corpus, tmp_path):
    made = prepare(f"{tmp_path}/store", dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES, augment=["noise"], workers=1)
    assert made.manifest("docs")["copies"]["noise"] > 50


@pytest.mark.parametrize("content", ["", "{}", '{"splits"'])
def test_a_manifest_that_says_nothing_is_damaged(corpus, tmp_path, content):
    how = f"{tmp_path}/store", dict(docs=f"jsonl:{tmp_path}/docs.jsonl"), BYTES
    prepare(*how, workers=1)
    (tmp_path / "store" / "docs" / "manifest.json").write_text(content)
    with pytest.raises(Mistake, match=r"manifest.json is damaged .*--overwrite"):
        store.open(how[0])
    with pytest.raises(Mistake, match=r"--overwrite"):
        prepare(*how, workers=1)


def test_a_value_of_another_type_is_named_with_the_type_that_is_meant():
    section = dict(sources=dict(docs="python-docs:"), tokenizer=BYTES)
    for key, value, words in [
        ("validation", "0.1", "a number"),
        ("validation", True, "a number"),
        ("split_seed", 1.5, "a whole number"),
        ("sources", "python-docs:", "a section"),
        ("clean", "unicode", "a list, each a text or a section"),
        ("workers", "two", "a whole number or None"),
        ("overwrite", 1, "True or False"),
    ]:
        with pytest.raises(Mistake, match=rf"config\.prepare\.{key} is {words}, not {value!r}"):
            spend("config.prepare", prepare, section | {key: value}, "store")
    for spec in (dict(kind="bytes", extra="<mask>"), dict(kind="characters", extra=[1])):
        with pytest.raises(Mistake, match=r"tokenizer '\w+'\.extra is a list, each a text, not"):
            tokenizers.train(["a"], spec)
    with pytest.raises(Mistake, match=r"config.prepare.clean: length.min_words is a whole number, not '2'"):
        Cleaner.of([dict(name="length", min_words="2")])
