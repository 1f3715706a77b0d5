"""What transformers answers, we answer: from small stored goldens (scripts/make_goldens.py)."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm import hf, models
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint, llama
from tests.golden import GOLDENS, folder_of, golden

PAIRS = [name for name in GOLDENS if "prompt_decoder" in golden(name).files]
ENCODERS = [name for name in GOLDENS if "prompt_hidden" in golden(name).files and name not in PAIRS]
ALONE = [name for name in GOLDENS if name not in PAIRS]
DECODERS = [name for name in ALONE if name not in ENCODERS]


@pytest.fixture(scope="module", params=GOLDENS)
def name(request):
    return request.param


def those(names):
    return pytest.mark.parametrize("name", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return folder_of(name, tmp_path_factory.mktemp("hf") / name)


@pytest.fixture(scope="module")
def lm(folder):
    return jaxlm.load(str(folder))


def answers(name, lm, which):
    """What the golden says of "prompt", "first" or "second", and our way to ask for it: (key, ask, want)."""
    g = golden(name)
    ways = dict(logits=lm.logits, hidden=lm.hidden, pooled=lm.pooled)
    return [(key, ask, g[f"{which}_{key}"]) for key, ask in ways.items() if f"{which}_{key}" in g.files]


def given(name, which):
    """The golden's tokens and, for models that have them, token types: as keywords."""
    g = golden(name)
    pair = {"decoder_ids": g[f"{which}_decoder"]} if f"{which}_decoder" in g.files else {}
    return {"token_ids": g[which], **pair, **({"types": g[f"{which}_types"]} if f"{which}_types" in g.files else {})}


def test_a_long_prompt_is_answered_alike(name, lm):
    for key, ask, want in answers(name, lm, "prompt"):
        what = given(name, "prompt")
        if key != "logits":
            what.pop("decoder_ids", None)
        np.testing.assert_allclose(ask(**what), want, atol=1e-4, err_msg=key)


@those(ALONE)
@pytest.mark.parametrize("left", [0, 4], ids=["right", "left"])
def test_padding_on_either_side_changes_nothing(name, lm, left):
    first, second = given(name, "first"), given(name, "second")
    padding = first["token_ids"].shape[1] - second["token_ids"].shape[1]
    around = (padding, 0) if left else (0, padding)
    both = {key: np.stack([first[key][0], np.pad(second[key][0], around)]) for key in first}
    both["mask"] = np.stack([np.ones_like(first["token_ids"][0]), np.pad(np.ones_like(second["token_ids"][0]), around)])
    for (key, ask, one), (_, _, other) in zip(answers(name, lm, "first"), answers(name, lm, "second")):
        if key == "pooled" and left:
            continue  # the first token of a row is padding then
        got = ask(**both)
        np.testing.assert_allclose(got[0], one[0], atol=1e-4, err_msg=key)
        np.testing.assert_allclose(got[1] if key == "pooled" else got[1][both["mask"][1] == 1], other[0], atol=1e-4)


@those(PAIRS)
def test_padding_of_encoder_and_decoder_changes_nothing(name, lm):
    """Left of the encoder's row, where its distances stay; right of the decoder's."""
    first, second = given(name, "first"), given(name, "second")
    sizes = [(row["token_ids"].shape[1], row["decoder_ids"].shape[1]) for row in (first, second)]
    (a, b), (c, d) = sizes
    tokens = np.stack([first["token_ids"][0], np.pad(second["token_ids"][0], (a - c, 0))])
    decoder = np.stack([np.pad(first["decoder_ids"][0], (0, d - b)), second["decoder_ids"][0]])
    mask = np.stack([np.ones(a, int), np.arange(a) >= a - c]).astype(int)
    decoder_mask = np.stack([np.arange(d) < b, np.ones(d, int)]).astype(int)
    got = lm.logits(tokens, decoder_ids=decoder, mask=mask, decoder_mask=decoder_mask)
    np.testing.assert_allclose(got[0, :b], golden(name)["first_logits"][0], atol=1e-4)
    np.testing.assert_allclose(got[1], golden(name)["second_logits"][0], atol=1e-4)


def packed(name):
    """Both short rows in one of 16 tokens, as `given`, in either order; and which document each token is of."""
    first, second, rows, segments = given(name, "first"), given(name, "second"), {}, {}
    for key, x in first.items():
        y = second[key]
        both = [np.concatenate(pair, axis=1)[0] for pair in ((x, y), (y, x))]
        which = [np.repeat([1, 2], [len(a[0]), len(b[0])]) for a, b in ((x, y), (y, x))]
        rows[key], segments[key] = (np.stack([np.pad(row, (0, 16 - len(row))) for row in all]) for all in (both, which))
    return rows, segments


def alone(name, key):
    """What the golden says of the documents of `packed`, each read alone: for both rows, one behind the other."""
    first, second = golden(name)[f"first_{key}"][0], golden(name)[f"second_{key}"][0]
    return np.stack([np.concatenate([first, second]), np.concatenate([second, first])])


@those(PAIRS)
def test_packed_pairs_answer_as_if_alone(name, lm):
    rows, segments = packed(name)
    where = dict(segments_BT=segments["token_ids"], decoder_segments_BT=segments["decoder_ids"])
    want = alone(name, "logits")
    got = lm._forward(lm.params, rows["token_ids"], decoder_BT=rows["decoder_ids"], **where)
    np.testing.assert_allclose(got[:, : want.shape[1]], want, atol=1e-4)


@those(PAIRS)
def test_the_decoder_one_token_at_a_time_equals_one_pass(name, lm):
    g = golden(name)
    real = jnp.ones(g["prompt"].shape, int)
    cache = lm.model.empty_cache(1, g["prompt_decoder"].shape[1])
    about = lambda m, c: m.remember(c, m.encode(g["prompt"], segments_BS=real), real)  # noqa: E731
    cache = jax.jit(lambda p, c: about(lm.blueprint.bind(p), c))(lm.params, cache)
    step = jax.jit(lambda p, t, c: lm.blueprint.bind(p).hidden(t, cache=c))
    got = []
    for at in range(g["prompt_decoder"].shape[1]):
        x, cache = step(lm.params, g["prompt_decoder"][:, at : at + 1], cache)
        got.append(lm.model.head(x))
    np.testing.assert_allclose(np.concatenate(got, axis=1), g["prompt_logits"], atol=1e-4)


@those(ALONE)
def test_packed_rows_answer_as_if_alone(name, lm):
    rows, segments = packed(name)
    where = {"types_BT": rows["types"]} if "types" in rows else {}
    key, run = ("hidden", lm._hidden) if name in ENCODERS else ("logits", lm._forward)
    got, want = run(lm.params, rows["token_ids"], segments_BT=segments["token_ids"], **where), alone(name, key)
    np.testing.assert_allclose(got[:, : want.shape[1]], want, atol=1e-4)


def test_the_next_sentence_head_agrees(tmp_path):
    g, lm = golden("bert"), jaxlm.load(str(folder_of("bert", tmp_path)))
    got = lm.model.follows(jnp.asarray(lm.pooled(**given("bert", "prompt"))))
    np.testing.assert_allclose(got, g["prompt_next"], atol=1e-4)


@those(DECODERS)
def test_cached_decoding_gives_the_same_logits(name, lm):
    """Prefill most of the long prompt, then one token at a time, as the engine does."""
    g, last = golden(name), 6
    model = jax.jit(lambda p, t, c: lm.blueprint.bind(p)(t, cache=c))
    cache = lm.model.empty_cache(1, g["prompt"].shape[1])
    got, cache = model(lm.params, g["prompt"][:, :-last], cache)
    rows = [got]
    for at in range(-last, 0):
        got, cache = model(lm.params, g["prompt"][:, at : at + 1 or None], cache)
        rows.append(got)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), g["prompt_logits"], atol=1e-4)


@those(["gemma3", "qwen2-window", "qwen3-moe"])  # the others write what transformers does: tests/test_hf_generate.py
def test_greedy_continuation_follows_the_largest_logit(name, lm):
    g = golden(name)
    prompts = [g["first"][0].tolist(), g["second"][0].tolist()]
    how = dict(max_new_tokens=5, temperature=0)
    found = lm.generate(prompts, **how)
    (wide,) = lm.generate(prompts[:1], beams=1, **how)
    assert wide == found[0], "alone as in a batch"
    assert lm.generate(np.array(prompts[0]), **how) == [found[0]], "one row of an array"
    for prompt, new in zip(prompts, found):
        row = list(prompt)
        for token in new:
            assert token == lm.logits(row)[0, -1].argmax()
            row.append(token)
        assert len(new) == 5 or lm.ends


@those(PAIRS)
def test_beams_of_an_encoder_decoder_are_scored_by_its_logits(name, lm):
    prompt = golden(name)["first"][0].tolist()
    (found,) = lm._beams([prompt], beams=3, max_new_tokens=4, stop=[])
    for tokens, score in found:
        row = [lm.blueprint.config.start, *tokens]
        logits = jax.nn.log_softmax(lm.logits(prompt, decoder_ids=row[:-1])[0])
        assert score == pytest.approx(float(logits[np.arange(len(tokens)), tokens].mean()), abs=1e-4)


def test_an_encoder_continues_nothing(tmp_path):
    lm = jaxlm.load(str(folder_of("bert", tmp_path)))
    for ask in (lambda: lm.generate([[1, 2]]), lambda: lm.nll(np.ones((1, 4), int))):
        with pytest.raises(Mistake, match=r"bert is .*encoder"):
            ask()
    with pytest.raises(Mistake, match="takes no decoder_ids"):
        lm.logits([1], decoder_ids=[2])


def test_import_then_export_is_the_identity(name, folder, lm, tmp_path):
    kind, form, config = models.to_hugging_face(lm.blueprint)
    assert config["architectures"] == json.loads((folder / "config.json").read_text())["architectures"]
    before = json.loads((folder / "config.json").read_text())
    assert kind == before["model_type"]
    hf.export(tmp_path, form, lm.params, config, shard=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    after = {k: v for file in set(index.values()) for k, v in load_file(tmp_path / file).items()}
    want = load_file(folder / "model.safetensors")
    assert after.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(after[key], want[key], err_msg=key)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == before["architectures"]
    again = jaxlm.load(str(tmp_path))
    assert again.blueprint.config == lm.blueprint.config


def test_weights_that_do_not_fit_are_a_mistake(name, tmp_path):
    folder = folder_of(name, tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    key = max(weights, key=lambda k: weights[k].size)

    def broken(**change):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, folder / "model.safetensors")
        return str(folder)

    with pytest.raises(Mistake, match=rf"lack '(\w+\.)?{re.escape(key)}'"):
        jaxlm.load(broken(**{key: None}))
    with pytest.raises(Mistake, match=r"no place for '.*stranger'"):
        jaxlm.load(broken(stranger=np.ones(3, np.float32)))
    with pytest.raises(Mistake, match=r"has shape \(3, 5\)"):
        jaxlm.load(broken(**{key: np.ones((3, 5), np.float32)}))


def test_a_file_that_is_cut_off_or_missing_is_a_mistake(tmp_path):
    folder = folder_of("llama", tmp_path / "a")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Mistake, match=r"model\.safetensors is damaged or cut off"):
        jaxlm.load(str(folder))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "b.safetensors"}})
    )
    with pytest.raises(Mistake, match=r"b\.safetensors is missing"):
        jaxlm.load(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(Mistake, match=r"pytorch_model\.bin is a pickle"):
        jaxlm.load(str(folder))


def test_what_no_family_has_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match=r"model_type in config\.json has no 'lama'; did you mean 'llama'"):
        jaxlm.load(str(folder_of("llama", tmp_path / "a", model_type="lama")))
    with pytest.raises(Mistake, match="hidden_act='relu'"):
        jaxlm.load(str(folder_of("llama", tmp_path / "a", hidden_act="relu")))
    with pytest.raises(Mistake, match="longrope"):
        jaxlm.load(str(folder_of("llama", tmp_path / "a", rope_parameters=dict(rope_type="longrope", factor=2.0))))


def test_a_model_that_transformers_does_not_have_is_not_exported():
    odd = Blueprint.of(
        dict(
            name="llama", layers=2, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16, bias="qkv", qk_norm=True
        ),
        vocab=8,
    )
    with pytest.raises(Mistake, match="no model of transformers is this llama: llama has no"):
        models.to_hugging_face(odd)


def test_a_second_copy_of_a_tied_parameter_has_to_be_equal(name, tmp_path):
    """Which of two would count? The model has one."""
    folder = folder_of(name, tmp_path)
    _, form = models.of_hugging_face(str(folder), hf.read_config(folder))
    weights = load_file(folder / "model.safetensors")
    for copy, first in form.copies.items():
        if copy in weights or first not in weights:
            continue  # not tied in this one
        save_file(weights | {copy: weights[first].copy()}, folder / "model.safetensors")
        jaxlm.load(str(folder))
        other = weights[first].copy()
        other.flat[-1] += 1
        save_file(weights | {copy: other}, folder / "model.safetensors")
        with pytest.raises(Mistake, match=f"'{copy}' differs from '{first}'"):
            jaxlm.load(str(folder))


QWEN = dict(model_type="qwen2", num_hidden_layers=2, sliding_window=8)


@pytest.mark.parametrize(
    "config, windows",
    [
        (QWEN, [None, None]),  # not unless it is said
        (QWEN | dict(use_sliding_window=True, max_window_layers=1), [None, 8]),
        (QWEN | dict(use_sliding_window=True), [None, None]),  # from the 28th layer on
        (QWEN | dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]), [None, 8]),
        (QWEN | dict(model_type="mistral"), [8, 8]),
        (QWEN | dict(model_type="llama"), [None, None]),
    ],
)
def test_the_layers_that_have_a_window(config, windows):
    whole = json.loads(str(golden("qwen2")["config"]))
    for key in ("layer_types", "use_sliding_window", "max_window_layers"):
        whole.pop(key, None)
    found = llama.HF[config["model_type"]].read(whole | config, set())
    assert llama.Config(vocab=8, **found).windows == windows


def test_without_a_tokenizer_text_is_a_mistake(tmp_path):
    lm = jaxlm.load(str(folder_of("llama", tmp_path)))
    with pytest.raises(Mistake, match="without tokenizer files"):
        lm.generate("hello")
    with pytest.raises(Mistake, match="vocabulary has"):
        lm.generate([[1, 99]])


def test_older_files_are_read(tmp_path):
    """No prefix, the causal mask among the tensors, the tied head once more; rope_theta at the top."""
    folder = folder_of("gpt2", tmp_path / "a")
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    weights |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": weights["wte.weight"]}
    save_file(weights, folder / "model.safetensors")
    g = golden("gpt2")
    np.testing.assert_allclose(jaxlm.load(str(folder)).logits(g["first"]), g["first_logits"], atol=1e-4)

    g = golden("llama-3")
    rope = dict(json.loads(str(g["config"]))["rope_parameters"])
    folder = folder_of(
        "llama-3", tmp_path / "b", rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope
    )
    np.testing.assert_allclose(jaxlm.load(str(folder)).logits(g["prompt"]), g["prompt_logits"], atol=1e-4)
