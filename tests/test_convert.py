"""`jaxlm convert`: a Hugging Face folder becomes a workdir and comes back; what goes wrong leaves nothing behind."""

import io
import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import sentencepiece
import tokenizers as hf_tokenizers

import jaxlm
from jaxlm import checkpoint, convert, generate
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from tests.golden import folder_of, golden
from tests.published import AROUND, with_tokenizer
from tests.runs import environment
from tests.trees import noisy

MODEL = dict(name="llama", layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16, context=64)
KINDS = {
    "huggingface": dict(kind="huggingface", vocab=300),
    "wordpiece": dict(kind="huggingface", algorithm="wordpiece", vocab=120),
    "unigram": dict(kind="sentencepiece", vocab=290),
    "bpe": dict(kind="sentencepiece", algorithm="bpe", vocab=320),
}
TEXTS = ["def f(x):\n\treturn x", "the  folder", "naïve 日本", "one two three four", "returns the other one"] * 3


def written_workdir(folder, kind, model=MODEL):
    """A workdir as training leaves it, with a tokenizer of this kind and checkpoints of steps 1 and 2."""
    tokenizer = tokenizers.train(TEXTS, KINDS.get(kind, dict(kind=kind)))
    tokenizer.save(folder / "tokenizer")
    configs.write(dict(model=model, dtype="float32"), str(folder))
    blueprint = Blueprint.of(model, vocab=tokenizer.vocab)
    with checkpoint.Checkpoints(str(folder), best=1) as checkpoints:
        checkpoints.save(1, dict(params=noisy(blueprint, 1)), dict(loss=1.0))
        checkpoints.save(2, dict(params=noisy(blueprint, 2)), dict(loss=2.0))
    return folder, tokenizer


def tensors(folder):
    return {key: x for file in folder.glob("*.safetensors") for key, x in load_file(file).items()}


@pytest.mark.parametrize("name", ["gpt2", "llama-3", "qwen2-window"])
def test_a_folder_becomes_a_workdir_and_comes_back(name, tmp_path, capsys):
    folder = with_tokenizer(folder_of(name, tmp_path / "a"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert convert.main([str(folder), str(tmp_path / "deep" / "run")]) == 0
    run = tmp_path / "deep" / "run"
    assert sorted(p.name for p in run.parent.iterdir()) == ["run"]
    lm, g = jaxlm.load(str(run)), golden(name)
    np.testing.assert_allclose(lm.logits(g["prompt"]), g["prompt_logits"], atol=1e-4)
    assert lm.tokenizer.encode("w9 w7") == [9, 7]
    assert generate.main([f"--workdir={run}", "--prompt=w8", "--max_new_tokens=2"]) == 0

    assert convert.main([str(run), str(tmp_path / "b"), "--shard=20KB"]) == 0
    want, got = tensors(folder), tensors(tmp_path / "b")
    assert got.keys() == want.keys() and all(np.array_equal(got[key], want[key]) for key in want)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "b" / file).read_text())
        assert [config[f"{n}_token_id"] for n in ("bos", "eos", "pad")] == [0, [1, 7], None]
    np.testing.assert_allclose(jaxlm.load(str(tmp_path / "b")).logits(g["first"]), g["first_logits"], atol=1e-4)
    assert "as step 0" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_tokenizer_gives_the_same_ids_behind_bos(kind, tmp_path):
    run, ours = written_workdir(tmp_path / "run", kind)
    convert.main([str(run), str(tmp_path / "out")])
    out = tmp_path / "out"
    theirs = hf_tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        assert theirs.encode(text).ids == [ours.bos, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    config = json.loads((out / "tokenizer_config.json").read_text())
    names = {name: theirs.token_to_id(config[f"{name}_token"] or "") for name in convert.SPECIALS}
    assert names == dict(bos=ours.bos, eos=ours.eos, pad=ours.pad)
    assert config["model_max_length"] == 64
    again = jaxlm.load(str(out))
    assert again.tokenizer.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    assert (again.tokenizer.bos, again.tokenizer.add_bos) == (ours.bos, True)
    assert (out / "tokenizer.model").exists() == (kind in ("unigram", "bpe"))


@pytest.mark.parametrize("around", AROUND)
def test_a_folder_s_tokenizer_comes_back_as_it_was(around, tmp_path):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"), around=around, config=dict(bos_token=None))
    convert.main([str(folder), str(tmp_path / "run")])
    convert.main([str(tmp_path / "run"), str(tmp_path / "b")])
    assert (tmp_path / "b" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    was, now = tokenizers.load(folder), tokenizers.load(tmp_path / "b")
    for key in ("bos", "eos", "pad", "add_bos", "add_eos", "fingerprint"):
        assert getattr(was, key) == getattr(now, key)


@pytest.mark.parametrize("around", ["none", "gpt2", "llama-3", "bert"])
def test_what_was_trained_with_bos_in_front_is_exported_so(around, tmp_path):
    """Whatever the tokenizer's file added before: the store's documents began with bos and ended with eos."""
    run, _ = written_workdir(tmp_path / "run", "bytes")
    folder = with_tokenizer(tmp_path / "words", around=around, size=259, config=dict(eos_token="</s>"))
    ours = tokenizers.load(dict(kind="huggingface", path=str(folder), bos="<s>"))
    ours.save(run / "tokenizer")
    convert.main([str(run), str(tmp_path / "out")])
    theirs = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("w7 w8").ids == [0, 7, 8]
    kept = json.loads(theirs.to_str())["post_processor"]
    assert ("ByteLevel" in json.dumps(kept)) == (around == "gpt2")


def test_what_is_no_decoder_is_exported_with_both_around_a_text(tmp_path):
    model = dict(name="bert", layers=1, width=16, heads=2, mlp_width=16, context=64)
    run, ours = written_workdir(tmp_path / "run", "wordpiece", model)
    convert.main([str(run), str(tmp_path / "out")])
    theirs = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("return x").ids == [ours.bos, *ours.encode("return x"), ours.eos]
    again = tokenizers.load(tmp_path / "out")
    assert (again.bos, again.eos, again.add_bos, again.add_eos) == (ours.bos, ours.eos, True, True)


def test_a_model_that_transformers_has_to_read_itself_is_exported_with_its_flags(tmp_path):
    """A SentencePiece model that normalises has no tokenizer.json like it."""
    run, _ = written_workdir(tmp_path / "run", "bytes", MODEL | dict(vocab=259))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizers.load(dict(kind="sentencepiece", path=str(tmp_path))).save(run / "tokenizer")
    convert.main([str(run), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = tokenizers.load(tmp_path / "out")
    assert (again.bos, again.eos, again.add_bos, again.add_eos) == (1, 2, True, False)


def test_roberta_s_padding_decides_its_positions_and_stays(tmp_path):
    model = dict(
        name="bert", layers=1, width=16, heads=2, mlp_width=16, context=64, types=1, skipped=2, pooled=False, next=False
    )
    run, ours = written_workdir(tmp_path / "run", "bytes", model)
    convert.main([str(run), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "roberta" and config["pad_token_id"] == 1 != ours.pad
    assert jaxlm.load(str(tmp_path / "out")).blueprint.config.skipped == 2


def test_a_decoder_that_is_as_deep_as_its_encoder_by_default_is_exported(tmp_path):
    model = dict(name="bart", layers=2, width=16, heads=2, mlp_width=16, context=64)
    run, _ = written_workdir(tmp_path / "run", "bytes", model)
    convert.main([str(run), str(tmp_path / "out")])
    assert jaxlm.load(str(tmp_path / "out")).blueprint.config.decoder_layers == 2


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_tokenizer_that_transformers_does_not_have_is_said(kind, tmp_path, capsys):
    run, ours = written_workdir(tmp_path / "run", kind)
    convert.main([str(run), str(tmp_path / "out")])
    assert f"no tokenizer: transformers has none like {kind}" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == ours.eos


@pytest.mark.parametrize(
    ("objective", "warned"), [(dict(name="prefix"), True), (dict(name="clm"), False), (None, False)]
)
def test_a_decoder_that_reads_its_prompts_both_ways_is_exported_with_a_warning(objective, warned, tmp_path, capsys):
    run, _ = written_workdir(tmp_path / "run", "bytes")
    configs.write(dict(model=MODEL, dtype="float32", objective=objective), str(run))
    convert.main([str(run), str(tmp_path / "out")])
    assert ("WARNING: the objective `prefix` trained this model" in capsys.readouterr().out) == warned


def test_a_step_and_a_dtype_are_chosen(tmp_path, capsys):
    run, _ = written_workdir(tmp_path / "run", "bytes")
    for step, number in dict(newest=2, best=1).items():
        convert.main([str(run), str(tmp_path / step), f"--step={step}"])
        assert f"from step {number}" in capsys.readouterr().out
        want = jaxlm.load(str(run), step=step).params["embed_VD"]
        np.testing.assert_array_equal(tensors(tmp_path / step)["model.embed_tokens.weight"], want)
    convert.main([str(run), "--dtype=bfloat16", str(tmp_path / "half")])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    got = jaxlm.load(str(tmp_path / "half")).params["embed_VD"]
    np.testing.assert_allclose(got, want := jaxlm.load(str(run)).params["embed_VD"], rtol=2**-8)
    assert not np.array_equal(got, want)


def spoil(folder, **change):
    file = folder / "model.safetensors"
    save_file({k: v for k, v in (load_file(file) | change).items() if v is not None}, file)


def change_config(folder, **change):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CHANGES = {
    "damaged or cut off": lambda f: os.truncate(f / "model.safetensors", 9000),
    "lack 'model.norm.weight'": lambda f: spoil(f, **{"model.norm.weight": None}),
    "no place for .*stranger": lambda f: spoil(f, **{"model.stranger": np.ones(3, np.float32)}),
    "has shape": lambda f: spoil(f, **{"lm_head.weight": np.ones((3, 5), np.float32)}),
    "config.json has no 'vocab_size', which a llama needs": lambda f: change_config(f, vocab_size=None),
    "config.json has no 'num_attention_heads'": lambda f: change_config(f, num_attention_heads=None),
    "config.json is not as a llama has it": lambda f: change_config(f, num_attention_heads="four", head_dim=0),
    "did you mean 'llama'": lambda f: folder_of("llama", f, model_type="lama"),
    "a workdir needs a tokenizer": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_spoilt_folder_is_a_mistake_and_leaves_nothing(message, tmp_path):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"))
    CHANGES[message](folder)
    with pytest.raises(Mistake, match=message):
        convert.main([str(folder), str(tmp_path / "run")])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_tokenizer_larger_than_the_model_is_told_before_weights_are_read(tmp_path):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"), size=41)
    with pytest.raises(Mistake, match="the tokenizer has 41 ids, but vocab_size is 40"):
        convert.main([str(folder), str(tmp_path / "run")])


def test_a_destination_that_holds_something_is_left_alone(tmp_path):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("!")
    for place in ("run", "run/precious"):
        with pytest.raises(Mistake, match="not empty"):
            convert.main([str(folder), str(tmp_path / place)])
    assert (tmp_path / "run" / "precious").read_text() == "!" and len(list((tmp_path / "run").iterdir())) == 1
    (tmp_path / "run" / "precious").unlink()
    convert.main([str(folder), str(tmp_path / "run")])
    assert (tmp_path / "run" / "config.json").exists()


def test_an_interrupted_or_failed_write_leaves_nothing(tmp_path, monkeypatch):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"))
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(checkpoint.Checkpoints, "save", fail)
        with pytest.raises(type(error)):
            convert.main([str(folder), str(tmp_path / "run")])
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_command_line_is_answered(tmp_path):
    folder = with_tokenizer(folder_of("llama", tmp_path / "a"))
    run, _ = written_workdir(tmp_path / "run", "bytes")
    out = str(tmp_path / "out")
    for message, argv in {
        "two folders": [str(folder)],
        "unexpected argument 'third'": [str(folder), out, "third"],
        "there is no such folder": [str(tmp_path / "nowhere"), out],
        "is no workdir": [str(tmp_path), out],
        "--dtype says how": [str(folder), out, "--dtype=bfloat16"],
        "--shard=5XB": [str(run), out, "--shard=5XB"],
        "did you mean 'bfloat16'": [str(run), out, "--dtype=bfloat"],
        "no checkpoint '7'": [str(run), out, "--step=7"],
        "did you mean '--shard'": [str(run), out, "--shards=1GB"],
        "is no Hugging Face folder": [str(run), "--check"],
    }.items():
        with pytest.raises(Mistake, match=message):
            convert.main(argv)
        assert not Path(out).exists()
    assert [convert.size(text) for text in ("5GB", "3 mb", "17")] == [5 * 10**9, 3 * 10**6, 17]


def test_a_name_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    folder = with_tokenizer(folder_of("gpt2", tmp_path / "a"))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
    convert.main(["some-body/gpt2.tiny", str(tmp_path / "run")])
    assert asked[0][0] == ("some-body/gpt2.tiny",)
    assert set(asked[0][1]["allow_patterns"]) == {"*.safetensors", "*.json", "*.model"}
    assert jaxlm.load(str(tmp_path / "run")).blueprint.name == "gpt2"


def test_a_hub_out_of_reach_is_a_mistake(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Mistake, match=r"no folder some-body/gpt2, and the hub .*: ConnectionError: no route to host$"):
        convert.main(["some-body/gpt2", str(tmp_path / "run")])


def large_folder(folder, *, vocab, width, layers):
    """A llama of random weights, written a tensor at a time; returns the bytes of all and of the largest."""
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (2 * width, width) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, 2 * width)}
    config = dict(
        model_type="llama", vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with_tokenizer(folder)
    sizes = [x.nbytes for x in weights.values()]
    return sum(sizes), max(sizes)


PEAK = """
import re, sys
from jaxlm import convert

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

convert.main([sys.argv[1], sys.argv[1] + "-run"])  # a small one first: what is compiled and loaded is no tensor
before = most()
convert.main([sys.argv[2], sys.argv[2] + "-run"])
print(most() - before)
"""


@pytest.mark.endurance
def test_importing_holds_the_parameters_and_little_more(tmp_path):
    """At most 1.2 times the largest tensor above the parameters, which on a CPU are in the host's memory."""
    large_folder(tmp_path / "small", vocab=64, width=64, layers=2)
    whole, largest = large_folder(tmp_path / "large", vocab=48_000, width=1024, layers=6)
    assert whole > 590e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        env={name: value for name, value in environment().items() if name != "XLA_FLAGS"},  # as users run it: fused
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    assert peak < whole + 1.2 * largest, f"{peak / 1e6:.0f} MB for {whole / 1e6:.0f} + 1.2 x {largest / 1e6:.0f}"
