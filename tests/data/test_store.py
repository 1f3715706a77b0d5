"""The token store: what is appended is what is read, and a half-made store is never read."""

from concurrent.futures import ThreadPoolExecutor
import itertools
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm.data import store, tokenizers
from jaxlm.lookup import Mistake


def append(writer, split, documents):
    tokens = np.array(list(itertools.chain.from_iterable(documents)), "uint16")
    lengths = np.array([len(document) for document in documents], np.int64)
    writer.append(split, tokens, lengths, lengths - 2)


def make(path, documents, name="docs"):
    writer = store.Writer(f"{path}/{name}", "uint16")
    append(writer, "train", documents)
    store.write_json(path / name / "manifest.json", dict(vocab=259, splits=writer.commit()))
    return store.open(path)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


DOCUMENTS = st.lists(st.lists(st.integers(0, 65_535), min_size=2, max_size=20), max_size=30)


@given(documents=DOCUMENTS, more=DOCUMENTS)
@settings(max_examples=15, deadline=None)
def test_a_document_never_loses_a_token(documents, more, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    writer = store.Writer(f"{path}/docs", "uint16")
    append(writer, "train", documents)
    sizes = writer.commit()
    append(store.Writer(f"{path}/docs", "uint16", sizes), "train", [[1, 2, 3]])  # killed before it could commit
    writer = store.Writer(f"{path}/docs", "uint16", sizes)
    append(writer, "train", more)
    store.write_json(path / "docs" / "manifest.json", dict(vocab=65_536, splits=writer.commit()))
    split, expected = store.open(path).split("docs", "train"), documents + more
    assert [split.document(i).tolist() for i in range(len(split))] == expected
    assert split.bytes.tolist() == [len(document) - 2 for document in expected]
    assert split.tokens_count == split.offsets[-1] == sum(map(len, expected))
    assert split.read(0, split.tokens_count).tolist() == list(itertools.chain.from_iterable(expected))
    assert split.document(0).dtype == np.int32 if expected else len(split) == 0


def test_a_resumed_writer_leaves_the_very_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 256)
    monkeypatch.setattr(store, "CHUNK", 64)
    batches = [[[i, j, i + j] * (j + 2) for j in range(i % 4)] for i in range(40)]
    straight = store.Writer(f"{tmp_path}/straight", "uint16")
    for batch in batches:
        append(straight, "train", batch)
    straight.commit()
    done, sizes = 0, None
    for stop in (7, 20, 21, 40):  # each resumes from the last commit and dies with work on disk that it did not record
        killed = store.Writer(f"{tmp_path}/killed", "uint16", sizes)
        for batch in batches[done:stop]:
            append(killed, "train", batch)
        done, sizes = stop, killed.commit()
        for batch in batches[stop : stop + 5]:
            append(killed, "train", batch)
        killed.commit()
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")
    assert len([name for name in contents(tmp_path / "killed") if "/c/" in name]) > 3


@pytest.mark.parametrize("held", [0, 1 << 20], ids=["read at random", "held decoded"])
def test_threads_and_other_processes_read_the_same(tmp_path, monkeypatch, held):
    monkeypatch.setattr(store, "HELD", held)
    split = make(tmp_path, [list(range(i, i + 50)) for i in range(200)]).split("docs", "train")
    again = pickle.loads(pickle.dumps(split))
    starts = list(range(0, 9_000, 97))
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda start: again.read(start, start + 300), starts))
    for start, row in zip(starts, rows):
        np.testing.assert_array_equal(row, split.read(start, start + 300))


def test_damage_on_disk_is_noticed(tmp_path):
    make(tmp_path, [list(range(50))] * 50)
    chunk = tmp_path / "docs/train/tokens/c/0"
    content = bytearray(chunk.read_bytes())
    content[10] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(Mistake, match=r"train/tokens is damaged.*Error reading shard entry.*--overwrite"):
        store.open(tmp_path).split("docs", "train").document(0)


@pytest.mark.parametrize("held", [0, 1 << 20], ids=["read at random", "held decoded"])
@pytest.mark.parametrize("lost", ["tokens/c/0", "offsets/c/0", "bytes/c/0", "tokens/zarr.json"])
def test_a_file_that_is_gone_is_no_row_of_zeros(tmp_path, monkeypatch, held, lost):
    monkeypatch.setattr(store, "HELD", held)
    make(tmp_path, [[0] * 50] * 50)
    assert store.open(tmp_path).split("docs", "train").document(3).tolist() == [0] * 50, "zeros that are there"
    (tmp_path / "docs/train" / lost).unlink()
    with pytest.raises(Mistake, match=rf"train/{lost.partition('/')[0]} is damaged or incomplete"):
        split = store.open(tmp_path).split("docs", "train")
        assert split.bytes.sum() and split.document(3).size


def test_a_split_has_what_its_manifest_says(tmp_path_factory):
    tmp_path, other = (tmp_path_factory.mktemp("store") for _ in range(2))
    make(tmp_path, [[1, 2]] * 3)
    make(other, [[1, 2]] * 2)
    (tmp_path / "docs/train").rename(tmp_path / "away")
    (other / "docs/train").rename(tmp_path / "docs/train")
    (tmp_path / "away").rename(other / "docs/train")
    with pytest.raises(Mistake, match=r"incomplete .2 documents, and its manifest has 3"):
        store.open(tmp_path).split("docs", "train")


def test_a_store_knows_its_sources_vocabulary_and_tokenizer(tmp_path):
    make(tmp_path, [[257, 65, 258]], "b")
    tokenizers.train([], dict(kind="bytes")).save(tmp_path / "tokenizer")
    opened = make(tmp_path, [[257, 66, 258]], "a")
    assert (opened.sources, opened.vocab, opened.path) == (["a", "b"], 259, str(tmp_path))
    assert opened.tokenizer().decode(opened.split("a", "train").document(0)) == "B"


def test_a_half_made_store_is_never_read(tmp_path):
    with pytest.raises(Mistake, match=r"no token store at .*no \(stores beside it: none\).* jaxlm prepare"):
        store.open(tmp_path / "no")
    with pytest.raises(Mistake, match="holds no source"):
        store.open(tmp_path)
    make(tmp_path, [[1, 2]], "a")
    store.Writer(f"{tmp_path}/b", "uint16").commit()
    with pytest.raises(Mistake, match=r"source b is not finished \(finished: a\).* jaxlm prepare"):
        store.open(tmp_path)


def test_names_that_the_store_does_not_hold_are_answered_with_those_it_does(tmp_path):
    opened = make(tmp_path, [[1, 2]])
    with pytest.raises(Mistake, match="did you mean 'docs'"):
        opened.split("dcos", "train")
    with pytest.raises(Mistake, match="Choices: train, validation"):
        opened.split("docs", "test")
