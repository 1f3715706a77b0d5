"""Text vectors: every kind of tokenizer finds its words in them, and what is no such file is named with its line."""

import gzip
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from jaxlm.data import tokenizers, vectors
from jaxlm.lookup import Mistake, spend

WIDTH = 3
TEXTS = ["the cat sat on the mat, The Paris cafés are the best; a b c the catalogue "] * 20
SPECS = dict(
    bpe=dict(kind="sentencepiece", algorithm="bpe", vocab=340),
    byte_level=dict(kind="huggingface", algorithm="bpe", vocab=320),
    wordpiece=dict(kind="huggingface", algorithm="wordpiece", vocab=120),
)


class Words:
    """A tokenizer of whole words, with a space in front as others mark it."""

    def __init__(self, *words):
        self.words, self.vocab = words, len(words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def write(folder, text, name="vectors.txt"):
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


def found(tokenizer, path, width=WIDTH):
    """Token id -> its vector."""
    ids, rows = spend("config.init", vectors.embeddings, dict(vectors=path), tokenizer, width)
    assert rows.dtype == np.float32 and rows.shape == (len(ids), width)
    return dict(zip(ids.tolist(), rows.tolist(), strict=True))


FEW = "the 1 2 3\nparis 4 5 6\n. . 7 8 9\nCat 1e-1 -2.5 .5\nthe 0 0 1\n"


def test_a_token_gets_the_vector_of_its_word_or_of_that_in_lower_case(tmp_path):
    tokenizer = Words("the", " the", "The", " Paris", "cat", "Cat", ". .", "", " ", "\ufffd")
    got = found(tokenizer, write(tmp_path, FEW + "\ufffd 1 1 1\n"))
    the, paris, cat = [1, 2, 3], [4, 5, 6], [np.float32(0.1), -2.5, 0.5]
    assert got == {0: the, 1: the, 2: the, 3: paris, 5: cat, 6: [7, 8, 9]}
    exact = found(Words("The", "the"), write(tmp_path, "the 1 2 3\nThe 4 5 6\n"))
    assert exact == {0: [4, 5, 6], 1: [1, 2, 3]}, "the exact word goes first, wherever it stands"


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_tokenizer_knows_its_words(name, tmp_path):
    tokenizer = tokenizers.train(TEXTS, SPECS[name])
    got = found(tokenizer, write(tmp_path, "the 1 2 3\ncat 4 5 6\nalogue 7 8 9\n</s> 1 1 1\n[PAD] 1 1 1\n"))
    [the] = {token for token in tokenizer.encode("cat the cat") if "the" in tokenizer.decode([token])}
    assert got[the] == [1, 2, 3]
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & got.keys(), "a special is no word"
    if name == "wordpiece":
        assert [7, 8, 9] not in got.values(), "nor is what goes on a word: ##alogue"


def test_characters_and_bytes_are_words_of_one_letter(tmp_path):
    path = write(tmp_path, "a 1 2 3\né 4 5 6\n")
    assert found(tokenizers.train(["aé"], dict(kind="characters")), path) == {0: [1, 2, 3], 1: [4, 5, 6]}
    assert found(tokenizers.train([], dict(kind="bytes")), path) == {65: [1, 2, 3], 97: [1, 2, 3]}


def test_compressed_files_and_the_header_of_word2vec_are_read(tmp_path):
    header = b"5 3\n" + FEW.replace("\n", " \n").encode()  # its lines end with a blank
    (tmp_path / "a.vec.gz").write_bytes(gzip.compress(header))
    with pa.CompressedOutputStream(str(tmp_path / "b.vec.zst"), "zstd") as stream:
        stream.write(header)
    plain = found(Words("the", "cat", "Cat"), write(tmp_path, FEW))
    assert plain.keys() == {0, 2}
    for name in ("a.vec.gz", "b.vec.zst"):
        assert found(Words("the", "cat", "Cat"), str(tmp_path / name)) == plain


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("the 1 2\n", r"vectors.txt: its vectors have 2 values, and the model's embeddings have 3"),
        ("9 300\nthe 1 2 3\n", r"vectors.txt: its vectors have 300 values"),
        ("a 1 2 3\nthe 1 2\n", r"vectors.txt, line 2: 2 values, where the others have 3"),
        ("a 1 2 3\nthe 1 2 3 4\n", r"vectors.txt, line 2: 4 values"),
        ("a 1 2 3\n\nthe 1 2 3\n", r"vectors.txt, line 2: 0 values"),
        ("a 1 2 3\nthe 1 2,5 3\n", r"vectors.txt, line 2: '2,5' is no number"),
        ("a 1 2 3\nthe 1 nan 3\n", r"vectors.txt, line 2: 'nan' is no number"),
        ("dog 1 2 3\n", r"vectors.txt: none of the tokenizer's 1 tokens is a word of it"),
        ("the 0 0 0\n", r"none of the tokenizer's 1 tokens"),
        ("", r"none of the tokenizer's 1 tokens"),
    ],
)
def test_what_is_no_file_of_vectors_is_named_with_its_line(tmp_path, text, complaint):
    with pytest.raises(Mistake, match=complaint):
        found(Words("the"), write(tmp_path, text))


def test_a_file_that_is_not_there_and_a_key_that_is_none_are_mistakes(tmp_path):
    write(tmp_path, FEW, "glove.txt")
    with pytest.raises(Mistake, match=r"no file matches .*glove.text.* glove.txt"):
        found(Words("the"), f"{tmp_path}/glove.text")
    with pytest.raises(Mistake, match=r"config\.init has no 'vector'; did you mean 'vectors'"):
        spend("config.init", vectors.embeddings, dict(vector="x"), Words("the"), WIDTH)


def test_only_wanted_words_are_held(tmp_path):
    """A file of some megabytes costs less than one."""
    line = " ".join(["0.12345"] * 50)
    path = write(tmp_path, "".join(f"word{i} {line}\n" for i in range(20_000)))
    tracemalloc.start()
    got = found(Words("word7", "word19999"), path, 50)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got.keys() == {0, 1} and most < 1_000_000
