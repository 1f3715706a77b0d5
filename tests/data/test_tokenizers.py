"""Every tokenizer: the text comes back, the result depends on the texts alone, and what is saved is what is loaded."""

import io
import json
import pickle
import pydoc_data.topics
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import sentencepiece
import tokenizers as hf

from jaxlm import lookup
from jaxlm.data import tokenizers
from jaxlm.data.cut import cut
from jaxlm.lookup import Mistake
from tests.published import AROUND, SPECIALS, template, with_tokenizer

TEXTS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:30]
SPECS = dict(
    bpe=dict(kind="sentencepiece", algorithm="bpe", vocab=600),
    unigram=dict(kind="sentencepiece", algorithm="unigram", vocab=600, sample=30_000),
    byte_level=dict(kind="huggingface", algorithm="bpe", vocab=600),
    wordpiece=dict(kind="huggingface", algorithm="wordpiece", vocab=600, lowercase=True),
    characters=dict(kind="characters", unknown="?"),
    bytes=dict(kind="bytes"),
)
LOSSLESS = ("bpe", "unigram", "byte_level", "bytes")
HARD = "\t a\n\n  b   \r\n▁c▁▁ d\x00 <s></s><unk><0x41>[CLS]<|endoftext|> é 漢字 🤖 \u2028\u00a0\ufeff⁇▅ "


@pytest.fixture(scope="module")
def trained():
    return {name: tokenizers.train(TEXTS, spec) for name, spec in SPECS.items()}


def test_every_kind_in_the_folder_is_tested():
    assert {spec["kind"] for spec in SPECS.values()} == set(lookup.names("jaxlm.data.tokenizers"))


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\t▁a"))
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back_to_the_last_blank(name, text, trained):
    assert trained[name].decode(trained[name].encode(text)) == text


@pytest.mark.parametrize("name", LOSSLESS)
def test_hard_texts_come_back_and_hold_no_special(name, trained):
    tok = trained[name]
    ids = tok.encode(HARD)
    assert tok.decode(ids) == HARD
    assert not {tok.bos, tok.eos, tok.pad} & set(ids)


@pytest.mark.parametrize("name", SPECS)
def test_specials_leave_no_trace_in_the_text(name, trained):
    tok = trained[name]
    specials = [i for i in (tok.bos, tok.eos, tok.pad) if i is not None]
    ids = tok.encode("the object is")
    assert tok.decode([*specials, *ids, *specials]) == "the object is"


@pytest.mark.parametrize("name", SPECS)
def test_ids_are_below_vocab_and_a_batch_is_its_texts(name, trained):
    tok = trained[name]
    batch = tok.encode_batch([*TEXTS[:3], HARD, ""])
    assert batch == [tok.encode(text) for text in [*TEXTS[:3], HARD, ""]]
    assert all(0 <= i < tok.vocab for ids in batch for i in ids) and batch[-1] == []


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_sizes_of_tokens_sum_up_to_the_bytes_of_the_text_even_in_parts_of_characters(name, trained):
    tok = trained[name]
    for text in ("漢字 é 🤖 object", HARD):
        assert sum(map(tok.size, tok.encode(text))) == len(text.encode())
    assert all(tok.size(i) == 0 for i in tok.specials.values())


@pytest.mark.parametrize("name", SPECS)
def test_what_is_saved_is_what_is_loaded_and_unpickled(name, trained, tmp_path):
    tok = trained[name]
    tok.save(tmp_path / "tok")
    for again in (tokenizers.load(tmp_path / "tok"), pickle.loads(pickle.dumps(tok))):
        assert again.encode(HARD) == tok.encode(HARD)
        assert vars(again).keys() == vars(tok).keys()
        for name in ("vocab", "bos", "eos", "pad", "add_bos", "add_eos", "fingerprint"):
            assert getattr(again, name) == getattr(tok, name)


@pytest.mark.parametrize("name", SPECS)
def test_training_depends_on_the_texts_alone(name, trained):
    assert tokenizers.train(iter(TEXTS), SPECS[name]).fingerprint == trained[name].fingerprint


def test_training_gives_the_same_in_another_process(trained):
    code = (
        "import sys, json; from jaxlm.data import tokenizers; texts, specs = json.load(sys.stdin);"
        "print(json.dumps([tokenizers.train(texts, spec).fingerprint for spec in specs]))"
    )
    names = ["bpe", "byte_level", "wordpiece"]
    sent = json.dumps([TEXTS, [SPECS[name] for name in names]])
    told = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == [trained[name].fingerprint for name in names]


def test_a_fingerprint_tells_tokenizers_apart(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    without_bos = tokenizers.load(dict(kind="sentencepiece", path=str(tmp_path / "tokenizer.model"), add_bos=False))
    assert not without_bos.add_bos and without_bos.add_eos
    assert len({tok.fingerprint for tok in [*trained.values(), without_bos]}) == len(SPECS) + 1


def test_a_sentencepiece_model_is_found_by_any_name(trained, tmp_path):
    """T5's is called spiece.model; beside a tokenizer.json, that is the one that counts."""
    trained["bpe"].save(tmp_path / "saved")
    folder = tmp_path / "hf"
    folder.mkdir()
    assert tokenizers.find(folder) is None
    (tmp_path / "saved" / "tokenizer.model").rename(folder / "spiece.model")
    assert tokenizers.load(folder).encode(TEXTS[0]) == trained["bpe"].encode(TEXTS[0])
    trained["byte_level"].save(folder)
    (folder / tokenizers.SPEC).unlink()
    assert tokenizers.load(folder).encode(TEXTS[0]) == trained["byte_level"].encode(TEXTS[0])


def test_characters_are_sorted_and_nothing_else():
    tok = tokenizers.train(["hello"], dict(kind="characters"))
    assert (tok.vocab, tok.encode("hole"), tok.decode([1, 3, 2, 0])) == (4, [1, 3, 2, 0], "hole")
    assert (tok.bos, tok.eos, tok.pad, tok.add_bos, tok.add_eos) == (None, None, None, False, False)
    with pytest.raises(Mistake, match="'x' is not among the 4"):
        tok.encode("hex")


def test_unknown_characters_become_the_one_that_stands_for_them():
    tok = tokenizers.train(["hello"], dict(kind="characters", unknown="?"))
    assert tok.decode(tok.encode("hexe!")) == "he?e?"


def test_wordpiece_lowercases_and_joins_its_pieces(trained):
    tok = trained["wordpiece"]
    assert tok.decode(tok.encode("The  Objects\nare evaluated")) == "the objects are evaluated"


def test_indentation_is_few_pieces(trained):
    assert len(trained["bpe"].encode(" " * 8)) <= 2


def test_any_sentencepiece_model_loads_with_its_own_specials(tmp_path):
    model = io.BytesIO()  # as T5's: no bos, a prefixed space, normalised
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")), model_writer=model, vocab_size=200, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    for place in (tmp_path, tmp_path / "spiece.model"):
        tok = tokenizers.load(place)
        assert (tok.bos, tok.eos, tok.pad, tok.add_bos, tok.add_eos) == (None, 1, 0, False, True)
        assert tok.decode(tok.encode("the  statement")) == "the statement"
        tok.encode("a ▁ literal")


def test_a_hugging_face_folder_loads_with_the_specials_of_its_config(trained, tmp_path):
    trained["byte_level"].save(tmp_path)
    (tmp_path / "spec.json").unlink()
    alone = tokenizers.load(tmp_path)
    assert alone.bos == alone.eos == 0 and alone.pad is None
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<|endoftext|>"}, "eos_token": "s"}')
    told = tokenizers.load(tmp_path)
    assert told.pad == 0 and told.eos == told.encode("s")[0]


@pytest.mark.parametrize("around", AROUND)
def test_a_published_tokenizer_adds_what_its_file_adds(around, tmp_path):
    """Whatever add_bos_token says: transformers 5 has an ear for the file alone."""
    _, before, after = AROUND[around]
    contrary = dict(add_bos_token=before is None, add_eos_token=after is None)
    folder = with_tokenizer(tmp_path, around=around, config=contrary)
    for place in (folder, folder / "tokenizer.json"):
        tok = tokenizers.load(place)
        assert (tok.add_bos, tok.add_eos) == (before is not None, after is not None)
        front, back = [tok.bos] if tok.add_bos else [], [tok.eos] if tok.add_eos else []
        assert [*front, *tok.encode("w7 w8"), *back] == hf.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
            "w7 w8"
        ).ids
        assert (tok.bos, tok.eos) == (SPECIALS.index(before or "<s>"), SPECIALS.index(after or "</s>"))


def test_a_published_tokenizer_prepares_documents_with_both(tmp_path):
    folder = with_tokenizer(tmp_path, around="gpt2", config=dict(bos_token="<|endoftext|>", eos_token="</s>"))
    tok = tokenizers.load(dict(kind="huggingface", path=str(folder)))
    assert (tok.bos, tok.eos, tok.add_bos, tok.add_eos) == (5, 1, True, True)
    tok = tokenizers.load(dict(kind="huggingface", path=str(folder), add_bos=False, bos="[CLS]"))
    assert (tok.bos, tok.eos, tok.add_bos, tok.add_eos) == (3, 1, False, True)


def test_a_special_that_a_config_denies_is_none(tmp_path):
    """As Qwen's: it has no bos, though there is a token with a usual name."""
    folder = with_tokenizer(tmp_path, config=dict(bos_token=None, pad_token="<|endoftext|>"))
    tok = tokenizers.load(folder)
    assert (tok.bos, tok.eos, tok.pad, tok.add_bos) == (None, 1, 5, False)
    assert tokenizers.load(dict(kind="huggingface", path=str(folder))).add_bos is False


def test_more_specials_than_one_on_a_side_are_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(AROUND, "two", (template(["[CLS]", "<s>"], []), None, None))
    with pytest.raises(Mistake, match=r"puts \['\[CLS\]', '<s>'\] before a text and \[\] behind it"):
        tokenizers.load(with_tokenizer(tmp_path, around="two"))
    assert tokenizers.load(dict(kind="huggingface", path=str(tmp_path), bos="<s>")).bos == 0


@pytest.mark.parametrize(
    "ids, config, added",
    [
        (dict(bos_id=1, eos_id=2, unk_id=0), None, (True, False)),  # Llama 2's, Gemma's
        (dict(bos_id=-1, eos_id=1, pad_id=0, unk_id=2), None, (False, True)),  # T5's
        (dict(bos_id=1, eos_id=2, unk_id=0), dict(add_bos_token=False, add_eos_token=True), (False, True)),
        (dict(bos_id=-1, eos_id=1, unk_id=0), dict(add_bos_token=True, add_eos_token=False), (False, False)),
    ],
)
def test_a_published_sentencepiece_model_adds_what_its_family_does(ids, config, added, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")), model_writer=model, vocab_size=200, minloglevel=2,
        hard_vocab_limit=False, **ids,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = tokenizers.load(tmp_path)
    assert (tok.add_bos, tok.add_eos) == added
    documents = tokenizers.load(dict(kind="sentencepiece", path=str(tmp_path)))
    assert (documents.add_bos, documents.add_eos) == (ids["bos_id"] >= 0, True)


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(kind="sentencepiec", vocab=9), "did you mean 'sentencepiece'"),
        (dict(vocab=9), "needs a kind, one of: bytes, characters"),
        (dict(kind="sentencepiece", vocab=600, algorithm="bqe"), "did you mean 'bpe'"),
        (dict(kind="sentencepiece", vocab=600, vocabulary=3), "did you mean 'vocab'"),
        (dict(kind="sentencepiece"), "needs 'vocab'"),
        (dict(kind="sentencepiece", vocab=600_000), "cannot train 600000 pieces"),
        (dict(kind="huggingface", vocab=100), "too small: bpe needs 257"),
        (dict(kind="huggingface", vocab=300, lowercase=True), "keeps every text as it is"),
        (dict(kind="characters", unknown="??"), "is one character"),
    ],
)
def test_mistakes_in_training_are_named(spec, message):
    with pytest.raises(Mistake, match=message):
        tokenizers.train(TEXTS[:2], spec)


def test_mistakes_in_loading_are_named(tmp_path):
    with pytest.raises(Mistake, match="nothing is there"):
        tokenizers.load(tmp_path / "no")
    with pytest.raises(Mistake, match=r"looked for spec.json, tokenizer.json, \*.model"):
        tokenizers.load(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(Mistake, match="not a SentencePiece model"):
        tokenizers.load(tmp_path / "bad.model")
    (tmp_path / "bad.json").write_bytes(b"{}")
    with pytest.raises(Mistake, match=r"not a Hugging Face tokenizer.json"):
        tokenizers.load(tmp_path / "bad.json")


def test_a_sample_is_bounded_spread_and_blind_to_order():
    texts = [f"document {i} " * 10 for i in range(2000)]
    sample = tokenizers.sample(texts, 20_000)
    assert set(sample) == set(tokenizers.sample(reversed(texts), 20_000))
    assert 8_000 < sum(map(len, sample)) <= 20_000
    assert 0.3 < sum(texts.index(text) < 1000 for text in sample) / len(sample) < 0.7
    assert tokenizers.sample(texts, 10**9) == texts


@given(text=st.text("ab\n"), limit=st.integers(1, 5))
def test_pieces_end_to_end_are_the_text_and_end_with_lines(text, limit):
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1])
