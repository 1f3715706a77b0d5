"""Every source gives whole documents, the same each time, and says exactly what cannot be read."""

from collections import Counter
import gzip
import itertools
import json
import os
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data import files, sources
from jaxlm.data.sources import hf
from jaxlm.data.splits import Splitter
from jaxlm.lookup import Mistake


def texts(spec, tally=None):
    return [document.text for document in sources.find(spec).read(tally)]


def compress(content, suffix):
    if suffix == ".gz":
        return gzip.compress(content[:7]) + gzip.compress(content[7:])  # as `cat a.gz b.gz` makes them
    return pa.Codec("zstd").compress(content, asbytes=True)


def write_tfds(folder):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Five documents."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"),)
        url_infos, code_path = {}, None  # what it would look up beside the code of a registered data set

        def _info(self):
            text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
            features = tfds.features.FeaturesDict(
                {"text": text, "n": number, "qa": {"a": tfds.features.Sequence(text)}}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((n, {"text": f"résumé {n}\n", "n": n, "qa": {"a": ["ja", "nö"]}}) for n in range(5))

    Tiny(data_dir=folder, config="small", file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One small file of each kind."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "b.txt").write_bytes("one\r\ntwo  \n\n\nthrée\n".encode())
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    (folder / "a.jsonl").write_text('{"text": "one", "body": "eins"}\n\n{"text": "two\\n", "body": "zwei"}\n')
    pq.write_table(pa.table({"text": ["one", "two\n"], "body": ["eins", "zwei"]}), folder / "a.parquet")
    write_tfds(folder)
    qa = [dict(text=f"Really? & why {n}", qa=dict(a=["ja", "nö"], n=n), label=n) for n in range(3)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa))
    pq.write_table(pa.Table.from_pylist(qa), folder / "qa.parquet")
    (folder / "hub").mkdir()
    for split in ("train", "validation"):
        rows = [dict(text=f"{split} {n}\n", qa=dict(a=["ja", "nö"])) for n in range(3)]
        (folder / "hub" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_file_is_a_document_and_files_come_sorted(corpus):
    assert texts(f"text:{corpus}/*.txt") == ["first\n", "one\r\ntwo  \n\n\nthrée\n"]


def test_lines_and_paragraphs_are_documents_when_asked(corpus):
    assert texts(f"text:{corpus}/b.txt?documents=line") == ["one", "two  ", "thrée"]
    assert texts(f"text:{corpus}/b.txt?documents=blank") == ["one\r\ntwo  ", "thrée"]


def test_records_give_the_field_that_is_asked_for(corpus):
    for kind in ("jsonl", "parquet"):
        assert texts(f"{kind}:{corpus}/a.{kind}") == ["one", "two\n"]
        assert texts(f"{kind}:{corpus}/a.{kind}?field=body") == ["eins", "zwei"]


def test_tfds_is_read_without_tensorflow(corpus):
    assert texts(f"tfds:tiny/small:train?data_dir={corpus}") == [f"résumé {n}\n" for n in range(5)]
    assert texts(f"tfds:tiny/small:train[1:3]?data_dir={corpus}") == ["résumé 1\n", "résumé 2\n"]
    assert "tensorflow" not in sys.modules


def test_a_folder_of_data_files_is_streamed_as_the_hub_would_be(corpus):
    pytest.importorskip("datasets")
    assert texts(f"hf:{corpus}/hub:validation") == [f"validation {n}\n" for n in range(3)]
    assert texts(f"hf:{corpus}/hub:train?template={{qa.a.1}} {{text}}") == [f"nö train {n}\n" for n in range(3)]
    found = sources.find(f"hf:{corpus}/hub:train")
    assert list(found.read()) == list(found.read()) and found.inputs["files"] == 2


def test_a_data_set_that_is_nowhere_is_refused_quickly_also_without_a_network(corpus, monkeypatch):
    """Where the Hub cannot be reached, and where it does not know the name."""
    pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    began = time.monotonic()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.hf_api.api, "endpoint", "http://127.0.0.1:9", raising=False)
    with pytest.raises(
        Mistake, match="hf:data/mine:train: no such folder here, and the Hugging Face Hub cannot be asked"
    ):
        texts("hf:data/mine:train")
    assert time.monotonic() - began < 5


TEMPLATE = "Q: {text}? {{x}} A: {qa.a.0}/{qa.n}&{label}\n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_template_makes_one_text_of_several_fields(corpus, kind):
    expected = [f"Q: Really? & why {n}? {{x}} A: ja/{n}&{n}\n" for n in range(3)]
    assert texts(f"{kind}:{corpus}/qa.{kind}?on_error=skip&template={TEMPLATE}") == expected


def test_a_template_reaches_into_the_features_of_tfds(corpus):
    spec = f"tfds:tiny/small:train[:2]?data_dir={corpus}&template={{n}}: {{qa.a.1}}, {{text}}"
    assert texts(spec) == [f"{n}: nö, résumé {n}\n" for n in range(2)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_compressed_files_give_the_same_documents(kind, suffix, tmp_path):
    content = b'{"text": "one"}\n{"text": "two"}\n' * 1000
    (tmp_path / "a").write_bytes(content)
    (tmp_path / f"a{suffix}").write_bytes(compress(content, suffix))
    assert texts(f"{kind}:{tmp_path}/a{suffix}") == texts(f"{kind}:{tmp_path}/a")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_ends_too_early_is_no_document(suffix, tmp_path):
    content = compress(b"".join(b"line %d\n" % i for i in range(99_999)), suffix)
    for there in (content[:-9], b""):  # an interrupted copy may hold nothing at all
        (tmp_path / f"a{suffix}").write_bytes(there)
        with pytest.raises(Mistake, match=f"a{suffix}: damaged"):
            texts(f"text:{tmp_path}/a{suffix}?documents=line")


def test_globs_reach_into_folders_and_signs_may_stand_in_names(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("x/1.txt", "x/y/2.txt", "x/what? 3#[a]&b=c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}/**/*.txt") == ["x/1.txt", "x/what? 3#[a]&b=c.txt", "x/y/2.txt"]
    assert texts(f"text:{tmp_path}/x/?.txt") == ["x/1.txt"]
    assert texts(f"text:{tmp_path}/x/what? 3#[a]&b=c.txt") == ["x/what? 3#[a]&b=c.txt"]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("text", ["añ\n漢字\n🤖🤖\n\nb" * 3, "漢字🤖ñ" * 9, "\n\n\n"])
def test_a_long_document_comes_in_pieces_that_are_whole_end_to_end(text, piece, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.text.PIECE", piece)
    monkeypatch.setattr("jaxlm.data.sources.PIECE", piece)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text=text)))
    for spec in (f"text:{tmp_path}/a.txt", f"jsonl:{tmp_path}/a.jsonl"):
        documents, tally = [], Counter()
        documents = list(sources.find(spec).read(tally))
        assert "".join(document.text for document in documents) == text
        assert [document.start for document in documents] == [0, *np.cumsum([len(d.text) for d in documents])[:-1]]
        assert {document.total for document in documents} == {len(text)}
        assert tally["cut"] == (len(documents) > 1)


def test_python_docs_are_topics_and_modules_about_two_megabytes():
    found = texts("python-docs:")
    assert 1.5e6 < sum(len(text.encode()) for text in found) < 4e6 and len(found) > 500
    assert found == texts("python-docs:") and sources.find("python-docs:").licence.startswith("PSF")
    json_module = next(text for text in found if text.startswith("JSON (JavaScript Object Notation)"))
    assert "Serialize ``obj`` as a JSON formatted stream" in json_module and "import" in json_module


def test_no_help_topic_is_a_section_of_another_which_training_saw():
    topics = [text for text in texts("python-docs:") if "\n****" in text]
    compound = next(text for text in topics if text.startswith("Compound statements\n***"))
    section = max(compound.partition('The "try" statement')[2][:5_000].split("\n\n"), key=len)
    assert "exception" in section and [text for text in topics if section in text] == [compound]


def test_python_source_is_code_without_tests():
    found = list(itertools.islice(sources.find("python-source:").read(), 20))
    assert all(compile(document.text, "a", "exec", dont_inherit=True) for document in found[:3])
    assert len(found) == 20


BAD = [
    ("jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', r"a.jsonl, line 2: not JSON", "bad JSON"),
    ("jsonl", b'{"text": "a"}\n["b"]\n{"text": "c"}\n', r"a.jsonl, line 2: a JSON list, not an object", "bad JSON"),
    (
        "jsonl",
        b'{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n',
        r"line 2: .*'text'; did you mean 'txt'",
        "missing field",
    ),
    ("jsonl", b'{"text": "a"}\n{"text": 7}\n{"text": "c"}\n', r"line 2: the field 'text' is int", "not text"),
    ("jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n', r"line 2, byte 11 .*UTF-8", "invalid UTF-8"),
    ("jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "c"}\n', r"line 2: not valid Unicode", "invalid UTF-8"),
    ("text", b"a\nok \xc3(\nc\n", r"a.text, line 2, byte 4 of the line: not valid UTF-8", "invalid UTF-8"),
]


@pytest.mark.parametrize("kind, content, message, fault", BAD)
def test_what_cannot_be_read_is_named_or_skipped_and_counted(kind, content, message, fault, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(content)
    spec = f"{kind}:{tmp_path}/a.{kind}?" + ("documents=line&" if kind == "text" else "")
    with pytest.raises(Mistake, match=message):
        texts(spec + "on_error=raise")
    tally = Counter()
    assert texts(spec + "on_error=skip", tally) == ["a", "c"]
    assert tally == {fault: 1}


def test_a_null_in_parquet_is_named_or_skipped_and_counted(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    with pytest.raises(Mistake, match=r"a.parquet, row 2: the record's 'text' is null"):
        texts(f"parquet:{tmp_path}/a.parquet")
    tally = Counter()
    assert texts(f"parquet:{tmp_path}/a.parquet?on_error=skip", tally) == ["one", "two"] and tally["missing field"] == 1


def test_a_file_with_bad_bytes_is_skipped_whole_even_when_they_come_late(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.text.PIECE", 8)
    (tmp_path / "a.txt").write_bytes(b"good line\ngood line\nbad \xff line\n")
    (tmp_path / "b.txt").write_bytes(b"fine")
    with pytest.raises(Mistake, match=r"a.txt, line 3, byte 5 of the line"):
        texts(f"text:{tmp_path}/*.txt")
    assert texts(f"text:{tmp_path}/*.txt?on_error=skip") == ["fine"]


def test_empty_documents_are_counted_and_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    tally = Counter()
    assert texts(f"text:{tmp_path}/a.txt", tally) == [] and tally["empty"] == 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{}/a.txt", "has no kind; write kind:PATH with one of: hf:, jsonl:, parquet:, python-docs:"),
        ("txt:{}/a.txt", "did you mean 'text'"),
        ("text:{}/aa.txt", r"no file matches .*aa.txt.* \(in .*: a.txt"),
        ("text:{}/*.text", r"no file matches .*\*.text"),
        ("text:{}/no/a.txt", "there is no folder .*/no"),
        ("text:{}", "is a folder; name its files: .*/\\*"),
        ("text:", "no file matches ''"),
        ("text:{}/a.txt?document=line", "did you mean 'documents'"),
        ("text:{}/a.txt?documents=lines", "did you mean 'line'"),
        ("text:{}/a.txt?on_error=ignore", "on_error has no 'ignore'. Choices: raise, skip"),
        ("parquet:{}/a.parquet?field=txt", "a.parquet: the schema has no 'txt'; did you mean 'text'"),
        ("parquet:{}/a.txt", "a.txt: damaged, or not a Parquet file"),
        ("tfds:tiny", "needs a name and a split"),
        ("tfds:tiny/small:test?data_dir={}", "cannot open 'tiny/small', split 'test'"),
        ("tfds:tiny/small:train?data_dir={}&field=txt", "the data set has no 'txt'; did you mean 'text'"),
        ("hf:{}", "needs a name and a split, as in hf:"),
        ("hf:{}/hub:test", "hf cannot open .*/hub', configuration 'default', split 'test': .*'train', 'validation'"),
        ("hf:{}/hub:train?config=large", "hf cannot open .*/hub', configuration 'large'"),
        ("hf:{}/hub:train?field=body", "hub:train: the data set has no 'body'. Choices: qa, text"),
        ("hf:{}/hub:train?feild=text", "did you mean 'field'"),
        ("hf:bad name!:train", "hf:bad name!:train: neither a folder here nor a data set of the Hub"),
        ("jsonl:{}/a.jsonl?field=text&template={{text}}", "the text is one or the other"),
        ("jsonl:{}/a.jsonl?template=text", "template=text names no field; write it in braces"),
        ("jsonl:{}/a.jsonl?template={{text", "a brace that is text is written twice"),
        ("jsonl:{}/a.jsonl?template={{text!r}}", "between braces stands the name of a field"),
        ("jsonl:{}/a.jsonl?template={{text:>9}}", "between braces stands the name of a field"),
        ("jsonl:{}/a.jsonl?template={{txt}}", "a.jsonl, line 1: the record has no 'txt'; did you mean 'text'"),
        ("jsonl:{}/a.jsonl?template={{text.0}}", "line 1: text is str, which holds no '0'"),
        ("parquet:{}/a.parquet?template={{txt}}", "a.parquet: the schema has no 'txt'; did you mean 'text'"),
        ("jsonl:{}/qa.jsonl?template={{qa.b}}", "line 1: qa: the record has no 'b'. Choices: a"),
        ("jsonl:{}/qa.jsonl?template={{qa.a.2}}", "line 1: qa.a has no place '2'; it has 2, counted from 0"),
        ("jsonl:{}/qa.jsonl?template={{qa.a}}", "line 1: the field 'qa.a' is list, not text"),
    ],
)
def test_mistakes_in_a_spec_are_answered_with_the_choices(spec, message, corpus):
    with pytest.raises(Mistake, match=message):
        texts(spec.format(corpus))


def test_what_a_library_cannot_read_is_a_mistake_or_skipped_and_counted(tmp_path, corpus, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n' * 2 + '{"text": oops\n')
    spec, tally = f"hf:{tmp_path}:train", Counter()
    with pytest.raises(Mistake, match=r"example 0 and what follows cannot be read .*on_error=skip"):
        texts(spec)
    assert texts(f"{spec}?on_error=skip", tally) == [] and tally == Counter({"unreadable rest": 1})

    def read(self, number):
        raise RuntimeError("damaged")

    spec = f"tfds:tiny/small:train?data_dir={corpus}"
    monkeypatch.setattr("tensorflow_datasets.core.data_sources.base.BaseDataSource.__getitem__", read)
    with pytest.raises(Mistake, match=r"train, example 0 cannot be read \(damaged\)"):
        texts(spec)
    assert texts(f"{spec}&on_error=skip", tally) == [] and tally["unreadable"] == 5


def test_a_lost_connection_to_the_hub_is_never_skipped():
    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone")

    with pytest.raises(Mistake, match=r"hf:a/b:train: example 1 and what follows cannot be read \(gone\)"):
        list(hf._numbered(rows(), "a/b:train", True, lambda fault: None))


def test_a_changed_input_is_told_from_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = sources.find(f"text:{tmp_path}/*.txt").inputs
    assert sources.find(f"text:{tmp_path}/*.txt").inputs == before
    (tmp_path / "b.txt").write_text("two")
    assert sources.find(f"text:{tmp_path}/*.txt").inputs != before


def test_an_edit_that_keeps_the_length_is_noticed_by_the_content_or_where_there_is_much_by_the_time(
    tmp_path, monkeypatch
):
    path, seen = tmp_path / "a.txt", []
    for limit in (files.CONTENT, 2):
        monkeypatch.setattr(files, "CONTENT", limit)
        for text, when in (("one", 1_000_000), ("two", 1_000_000), ("two", 2_000_000)):
            path.write_text(text)
            os.utime(path, (when, when))
            seen.append(sources.find(f"text:{path}").inputs["digest"])
    assert seen[0] != seen[1] == seen[2] and seen[3] == seen[4] != seen[5]


def split(how, fraction, documents, seed=0):
    splitter = Splitter(how, fraction, seed)
    return [splitter.parts(marked, marked.document.text) for marked in splitter.mark(documents)]


def whole(found):
    return [document for text in found for document in sources.pieces(text)]


def test_equal_documents_are_on_the_same_side_and_whole():
    documents = whole([f"document {i % 500}" for i in range(1000)])
    sides = split("document", 0.2, documents)
    assert sides[:500] == sides[500:] and all((train == "") != (held == "") for train, held in sides)
    assert 0.1 < np.mean([held != "" for _, held in sides]) < 0.3
    assert sides != split("document", 0.2, documents, seed=1)
    assert split("document", 0, documents) == [(document.text, "") for document in documents]


def test_pieces_of_a_document_are_on_its_side(monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.PIECE", 4)
    for i in range(20):
        sides = split("document", 0.5, whole([f"{i} a long document in many pieces"]))
        assert len(sides) > 3 and len({held == "" for _, held in sides}) == 1


@pytest.mark.parametrize("piece", [3, 5, 100])
def test_the_tail_is_the_last_part_of_the_whole_document(piece, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.PIECE", piece)
    sides = split("tail", 0.1, whole(["abcdefghij" * 3]))
    assert "".join(train for train, _ in sides) == ("abcdefghij" * 3)[:27]
    assert "".join(held for _, held in sides) == "hij"


def test_a_fraction_must_be_one():
    with pytest.raises(Mistake, match=r"config.prepare.validation is a fraction .* not 5"):
        Splitter("document", 5)
    with pytest.raises(Mistake, match="did you mean 'document'"):
        Splitter("documents", 0.5)
