"""`jaxlm generate`: one prompt streams to the terminal, a file of prompts becomes a file of texts in its order."""

import functools
import inspect
import json

import pytest

from jaxlm import checkpoint, generate, lm
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint

MODEL = dict(name="gpt2", layers=1, width=8, heads=2, context=64)
PROMPTS = ["one", "日本", "three\nlines", "", "five"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    run = tmp_path_factory.mktemp("generate")
    tokenizer = tokenizers.train([], dict(kind="bytes"))
    tokenizer.save(run / "tokenizer")
    configs.write(dict(model=MODEL, length=16, dtype="float32"), str(run))
    model = Blueprint.of(MODEL, vocab=tokenizer.vocab)
    with checkpoint.Checkpoints(str(run)) as checkpoints:
        checkpoints.save(1, dict(params=model.init(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "load", functools.cache(lm.load))  # the programs compile once for all tests
        yield str(run)


def test_one_prompt_is_continued_on_the_terminal(workdir, capsys):
    assert generate.main([f"--workdir={workdir}", "--prompt=one", "--max_new_tokens=9", "--top_k=5", "--seed=3"]) == 0
    [text] = lm.load(workdir, step="newest").generate("one", max_new_tokens=9, top_k=5, seed=3)
    assert capsys.readouterr().out == f"one{text}\n"


def test_specials_are_taken_by_their_names_where_that_is_asked_for(workdir, capsys):
    flags = [f"--workdir={workdir}", "--prompt=one</s>", "--temperature=0", "--max_new_tokens=4"]
    tokenizer, texts = lm.load(workdir, step="newest").tokenizer, {}
    for asked in (True, False):
        assert generate.main([*flags, f"--specials={asked}"]) == 0
        texts[asked] = capsys.readouterr().out
    ids = [tokenizer.bos, *tokenizer.encode("one"), tokenizer.eos]
    new = lm.load(workdir, step="newest").generate(ids, temperature=0, max_new_tokens=4)[0]
    assert texts[True] == f"one</s>{tokenizers.Named(tokenizer).decode(new)}\n"
    assert texts[False] != texts[True]


def test_a_file_of_prompts_is_answered_in_order_and_whatever_the_batch(workdir, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(dict(id=i, prompt=prompt)) + "\n" for i, prompt in enumerate(PROMPTS)))
    flags = [
        f"--workdir={workdir}",
        f"--prompts={file}",
        f"--output={out}",
        "--max_new_tokens=8",
        "--num_return_sequences=2",
    ]
    assert generate.main([*flags, "--batch=2"]) == 0
    expected = lm.load(workdir, step="newest").generate(PROMPTS, max_new_tokens=8, num_return_sequences=2)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records == [dict(id=i, prompt=p, texts=texts) for i, (p, texts) in enumerate(zip(PROMPTS, expected))]


def test_a_text_file_holds_a_prompt_a_line_and_without_output_lines_are_printed(workdir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\nfive\n")
    assert (
        generate.main([f"--workdir={workdir}", f"--prompts={tmp_path}/prompts.txt", "--beams=2", "--max_new_tokens=4"])
        == 0
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in records] == ["one", "five"]
    assert [r["texts"] for r in records] == [
        [t] for t in lm.load(workdir, step="newest").generate(["one", "five"], beams=2, max_new_tokens=4)
    ]


def test_a_last_token_is_forced_by_its_id(workdir, capsys):
    flags = [f"--workdir={workdir}", "--prompt=one", "--max_new_tokens=4", f"--forced_eos={ord('!')}"]
    assert generate.main([*flags, "--temperature=0", "--min_new_tokens=4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("one") and text.endswith("!\n")


def test_every_option_of_the_python_api_is_a_flag():
    options = {n for n, p in inspect.signature(lm.LM.generate).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(generate.OPTIONS) == options - {"stream", "first"}


def test_only_a_line_feed_parts_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028two\x0b\x85\r\n\nlast".encode())
    assert [r["prompt"] for r in generate.read_prompts(f"{tmp_path}/a.txt")] == ["one\u2028two\x0b\x85", "", "last"]
    line = json.dumps(dict(prompt="one\u2028two"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [r["prompt"] for r in generate.read_prompts(f"{tmp_path}/a.jsonl")] == ["one\u2028two"] * 2
    (tmp_path / "empty.txt").write_bytes(b"")
    assert generate.read_prompts(f"{tmp_path}/empty.txt") == []


def test_mistakes_name_the_flag_or_the_line(workdir, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a\nna\xefve\n")
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "about": "\\ud800"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (tmp_path / "worse.jsonl").write_text('{"prompt": "a"\n')
    for flags, complaint in [
        (["--tempertaure=1"], "did you mean '--temperature'"),
        (["--prompt=a", "--prompts=b"], "both given"),
        (["--prompts=nowhere.txt"], "no file at nowhere.txt"),
        ([f"--prompts={tmp_path}/bad.jsonl"], "bad.jsonl, line 2"),
        ([f"--prompts={tmp_path}/worse.jsonl"], "worse.jsonl, line 1: not JSON"),
        ([f"--output={tmp_path}/no/such/file"], "no folder"),
        ([f"--output={tmp_path}"], "it is a folder; name a file in it"),
        ([f"--prompts={tmp_path}/latin.txt"], "latin.txt, line 2: not UTF-8"),
        ([f"--prompts={tmp_path}/half.jsonl"], r"half.jsonl, line 1 holds '\\ud800', half of a surrogate pair"),
        (["--prompt=\udcff"], "--prompt holds .*half of a surrogate pair"),
        (["--step=7", "--prompt=a"], "no checkpoint '7'"),
    ]:
        with pytest.raises(Mistake, match=complaint):
            generate.main([f"--workdir={workdir}", *flags])
    with pytest.raises(Mistake, match="--workdir is missing"):
        generate.main(["--prompt=a"])
