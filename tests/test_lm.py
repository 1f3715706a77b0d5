"""The Python API: what a notebook user is promised."""

import json
import math
import re

import jax
import numpy as np
import pytest
import tokenizers as hf

import jaxlm
from jaxlm import checkpoint
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.lm import LM
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.reply import Reply
from tests.golden import folder_of
from tests.published import AROUND, with_tokenizer
from tests.trees import noisy

CONTEXT = 48
TEXTS = ["the cat sat on the mat ", "naïve café — 日本語 🙂 ", "def f(x):\n    return x\n", "one  two   three"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(TEXTS, dict(kind="sentencepiece", algorithm="bpe", vocab=340))


@pytest.fixture(scope="module")
def lm(tokenizer):
    section = dict(name="llama", layers=1, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=32, context=CONTEXT)
    model = Blueprint.of(section, vocab=tokenizer.vocab)
    return LM(model, noisy(model), tokenizer, dict(model=section, length=32))


class NoBos:
    """A tokenizer of bytes that marks neither beginning nor end."""

    vocab, bos, eos, pad, add_bos, add_eos, fingerprint = 256, None, None, None, False, False, "none"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def size(self, token):
        return 1


def test_logits_are_those_of_the_model_for_one_row_and_for_several(lm):
    rows = np.random.default_rng(0).integers(0, lm.tokenizer.vocab, (2, 9))
    expected = np.asarray(jax.jit(lambda params: lm.blueprint.bind(params)(rows)[0])(lm.params))
    got = lm.logits(rows.tolist())
    assert got.shape == (2, 9, lm.tokenizer.vocab) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(lm.logits(rows[0]), expected[:1], atol=1e-5)


def test_a_score_is_the_sum_over_the_document_as_a_store_holds_it(lm):
    texts = ["the café", "", "日本語 on the mat"]
    for text, score in zip(texts, lm.score(texts), strict=True):
        row = [lm.tokenizer.bos, *lm.tokenizer.encode(text), lm.tokenizer.eos]
        log_probs = jax.nn.log_softmax(lm.logits(row)[0])
        nats = -sum(float(log_probs[i, token]) for i, token in enumerate(row[1:]))
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert (score.tokens, score.bytes) == (len(row) - 1, len(text.encode()))
        if text:
            assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_score_without_bos_is_of_the_bytes_of_the_tokens_that_are_predicted(lm):
    for text, score in zip(["the café", "t"], LM(lm.blueprint, lm.params, NoBos(), None).score(["the café", "t"])):
        assert score.tokens == score.bytes == len(text.encode()) - 1


def test_a_text_longer_than_the_context_is_scored_in_windows(lm):
    text = "the cat sat on the mat " * 20
    [whole] = lm.score(text)
    assert whole.tokens == len(lm.tokenizer.encode(text)) + 1 > 2 * lm.context and lm.context == 32
    assert lm.score([text], stride=1)[0].nats != whole.nats, "more context, another score"


def test_greedy_text_is_what_the_logits_say(lm):
    [text] = lm.generate(["the cat"], temperature=0, max_new_tokens=12)
    row = [lm.tokenizer.bos, *lm.tokenizer.encode("the cat")]
    for _ in range(12):
        row.append(int(lm.logits(row)[0, -1].argmax()))
        if row[-1] == lm.tokenizer.eos:
            break
    assert text == lm.tokenizer.decode(row)[len("the cat") :]


def test_the_shape_of_the_answer_follows_the_question(lm):
    some = dict(max_new_tokens=6, seed=1)
    assert [len(lm.generate("the", **some)), len(lm.generate(["the", "a", "b"], **some))] == [1, 3]
    several = lm.generate(["the", "a"], num_return_sequences=3, **some)
    assert [len(texts) for texts in several] == [3, 3] and len({*several[0]}) == 3
    searched = lm.generate(["the", "a"], num_return_sequences=2, beams=3, **some)
    assert [len(texts) for texts in searched] == [2, 2] and len({*searched[0]}) == 2
    assert lm.generate([], **some) == []


def test_what_is_drawn_does_not_depend_on_the_batch(lm):
    prompts = ["the", "cat sat", "x", "日本", "def f("]
    some = dict(max_new_tokens=10, top_p=0.9, seed=5)
    together = lm.generate(prompts, **some)
    assert lm.generate(prompts, batch=2, **some) == together
    assert lm.generate(prompts[3:], first=3, **some) == together[3:]
    assert lm.generate(prompts, **{**some, "seed": 6}) != together


def test_a_stop_string_ends_the_text_before_it_and_spans_tokens(lm):
    whole = lm.generate("the cat", max_new_tokens=30, seed=2)[0]
    stop = whole[7:10]
    assert lm.generate("the cat", max_new_tokens=30, seed=2, stop=[stop, "never there"]) == [whole[: whole.index(stop)]]
    assert lm.generate("the cat", max_new_tokens=30, seed=2, stop=stop) == [whole[: whole.index(stop)]]


def test_the_stream_is_the_text_in_pieces(lm):
    for stop in ([], ["a", "th"]):
        pieces = []
        [text] = lm.generate("the cat", max_new_tokens=30, seed=4, stop=stop, stream=pieces.append)
        assert "".join(pieces) == text == lm.generate("the cat", max_new_tokens=30, seed=4, stop=stop)[0]
        assert stop or len(pieces) > 3


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "huggingface", "characters"])
def test_half_a_character_is_never_streamed_and_no_space_is_lost(kind):
    options = dict(sentencepiece=dict(algorithm="bpe", vocab=340), huggingface=dict(vocab=300)).get(kind, {})
    tok = tokenizers.train(TEXTS, dict(kind=kind, **options))
    prompt, rest = "one  two", "   three naïve 日本語 🙂 — one\n    return"
    if kind == "characters":
        rest = "   three naïve 日本語 🙂"
    pieces: list[str] = []
    reply = Reply(tok, tok.encode(prompt), [], pieces.append)
    for token in tok.encode(rest):
        reply.add([token])
        assert "�" not in "".join(pieces) and rest.startswith("".join(pieces))
    assert reply.finish() == "".join(pieces) == rest


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    pieces: list[str] = []
    reply = Reply(NoBos(), [], ["</s>", "<|"], pieces.append)
    sent = []
    for character in "a</b<":
        reply.add([ord(character)])
        sent.append("".join(pieces))
    assert sent == ["a", "a", "a", "a</b", "a</b"]
    assert reply.finish() == "".join(pieces) == "a</b<"
    assert reply.add([ord("|")]) and reply.text == "a</b"


def test_options_that_cannot_be_are_mistakes(lm):
    for options, complaint in [
        (dict(temperatur=1.0), "did you mean 'temperature'"),
        (dict(temperature=-1.0), "temperature=-1.0 is outside"),
        (dict(beams=2, num_return_sequences=3), "num_return_sequences=3"),
        (dict(beams=2, temperature=0.5), "temperature=0.5"),
        (dict(beams=2, top_k=5), "top_k=5"),
        (dict(beams=2, length_penalty=99.0), "length_penalty=99.0"),
        (dict(forced_eos=5000), "forced_eos=5000: the vocabulary has 340 ids"),
        (dict(forced_bos=5), "forced_bos=5 is for encoder-decoders"),
        (dict(stop=[""]), "stop string is not empty"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(beams=0), "beams: 1 at least"),
        (dict(beams=-3), "beams: 1 at least"),
        (dict(num_return_sequences=2, stream=print), "stream follows one text"),
    ]:
        with pytest.raises(Mistake, match=re.escape(complaint)):
            lm.generate("the", **options)
    with pytest.raises(Mistake, match="did you mean 'stride'"):
        lm.score("the", strid=3)


def test_prompts_and_ids_that_do_not_fit_are_mistakes(lm):
    with pytest.raises(Mistake, match="leaves no room in the model's context of 48"):
        lm.generate("the cat " * 50)
    for ids, complaint in [
        ([], "whole numbers"),
        ([0.5], "whole numbers"),
        ([[1, 2], [3]], "one length"),
        ([1, 5000], "vocabulary has 340"),
        ([1] * 49, "the model reads 48"),
    ]:
        with pytest.raises(Mistake, match=complaint):
            lm.logits(ids)


def test_half_of_a_surrogate_pair_is_no_text(lm):
    for ask in (lm.generate, lm.score, lm.document):
        with pytest.raises(Mistake, match=r"holds '\\udcff', half of a surrogate pair, at character 3"):
            ask("the\udcff")


@pytest.mark.parametrize("kind", [np.asarray, list, jax.numpy.asarray], ids=["numpy", "list", "jax"])
def test_a_mask_may_be_of_booleans(lm, kind):
    ids, mask = [[5, 6, 7, 0]], [[True, True, True, False]]
    want = lm.logits(ids, mask=np.asarray(mask, np.int32))
    np.testing.assert_array_equal(lm.logits(ids, mask=kind(mask)), want)
    np.testing.assert_array_equal(lm.hidden(ids, mask=kind(mask)), lm.hidden(ids, mask=np.asarray(mask, np.int32)))
    with pytest.raises(Mistake, match="whole numbers"):
        lm.logits([[True, False]])


def test_numbers_beyond_an_int_are_as_good_as_the_rows_length(lm):
    free = lm.generate([[5, 6, 7]], temperature=0, max_new_tokens=CONTEXT)
    for size in (CONTEXT + 1, 2 * 10**9, 10**11):
        assert lm.generate([[5, 6, 7]], temperature=0, max_new_tokens=CONTEXT, no_repeat_ngram_size=size) == free
    assert lm.generate([[5, 6, 7]], max_new_tokens=4, top_k=10**11) == lm.generate([[5, 6, 7]], max_new_tokens=4)


def test_an_empty_prompt_begins_a_document_where_there_is_a_bos(lm):
    assert lm.generate("", max_new_tokens=5, temperature=0) == lm.generate([""], max_new_tokens=5, temperature=0)
    model = Blueprint.of(dict(name="gpt2", layers=1, width=8, heads=2, context=16), vocab=256)
    bare = LM(model, model.init(0), NoBos())
    with pytest.raises(Mistake, match="no bos token"):
        bare.generate(["a", ""])


def test_a_workdir_is_loaded_with_all_it_holds(lm, tmp_path):
    configs.write(dict(model=dict(lm.config["model"]), length=32, dtype="float32"), str(tmp_path))
    lm.tokenizer.save(tmp_path / "tokenizer")
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, {"params": lm.params})
    loaded = jaxlm.load(str(tmp_path))
    assert loaded.config.length == loaded.context == 32
    np.testing.assert_array_equal(loaded.logits([1, 2, 3]), lm.logits([1, 2, 3]))
    assert loaded.tokenizer.fingerprint == lm.tokenizer.fingerprint
    half = jaxlm.load(str(tmp_path), step=3, dtype="bfloat16", specials=True)
    assert half.blueprint.config.dtype == "bfloat16"


@pytest.mark.parametrize("beams", [1, 2])
def test_more_new_tokens_than_a_number_holds_are_as_many_as_there_is_room_for(lm, beams):
    how = dict(temperature=0, beams=beams) if beams == 1 else dict(beams=beams)
    want = lm.generate([[5, 6, 7]], max_new_tokens=CONTEXT, **how)
    assert want[0] and lm.generate([[5, 6, 7]], max_new_tokens=2**31 - 1, **how) == want
    assert lm.generate([[5, 6, 7]], max_new_tokens=10**11, **how) == want


def test_a_folder_that_is_no_workdir_or_has_no_checkpoint_is_a_mistake(tmp_path, lm):
    with pytest.raises(Mistake, match="is no workdir"):
        jaxlm.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Mistake, match=r"config.json has no 'model'"):
        jaxlm.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dict(model=lm.config["model"])))
    lm.tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(Mistake, match="no finished checkpoint"):
        jaxlm.load(str(tmp_path))


@pytest.mark.parametrize("around", AROUND)
def test_a_prompt_to_a_published_model_begins_as_its_tokenizer_says(around, tmp_path):
    """And a text for an encoder ends so as well."""
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"), around=around)
    lm = jaxlm.load(str(folder))
    ids = [i for i in (lm.tokenizer.bos if lm.tokenizer.add_bos else None, 7, 8) if i is not None]
    [text] = lm.generate(["w7 w8"], temperature=0, max_new_tokens=4)
    assert text.split() == lm.tokenizer.decode(lm.generate([ids], temperature=0, max_new_tokens=4)[0]).split()

    pair = jaxlm.load(str(with_tokenizer(folder_of("bart", tmp_path / "b"), around=around)))
    whole = hf.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("w7 w8").ids
    assert pair.document("w7 w8").tolist() == whole
    [text] = pair.generate(["w7 w8"], temperature=0, max_new_tokens=4)
    assert text.split() == pair.tokenizer.decode(pair.generate([whole], temperature=0, max_new_tokens=4)[0]).split()
