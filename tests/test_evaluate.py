"""`jaxlm evaluate`: its figures are the model's own, over exactly the text that was named."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from jaxlm import checkpoint, evaluate, lm
from jaxlm import config as configs
from jaxlm.data import store as token_store
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.prepare import prepare
from tests.trees import noisy

MODEL = dict(name="gpt2", layers=1, width=8, heads=2, context=24)
TEXTS = [
    "naïve café",
    "a",
    "one two three four five six seven eight nine ten eleven twelve",
    "日本語",
    "five",
    "six",
    "seven",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on two sources of bytes, and its store beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, texts in (("long", TEXTS), ("short", TEXTS[::-1])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    sources = {name: f"jsonl:{root}/{name}.jsonl" for name in ("long", "short")}
    made = prepare(f"{root}/store", sources, dict(kind="bytes"), validation=0.4, workers=1)
    run = root / "run"
    run.mkdir()
    made.tokenizer().save(run / "tokenizer")
    configs.write(dict(model=MODEL, length=16, store=f"{root}/store", dtype="float32"), str(run))
    model = Blueprint.of(MODEL, vocab=made.vocab)
    with checkpoint.Checkpoints(str(run)) as checkpoints:
        checkpoints.save(1, dict(params=noisy(model, std=0.2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "load", functools.cache(lm.load))  # the program compiles once for all tests
        yield str(run)


def results(workdir, capsys, *flags):
    assert evaluate.main([f"--workdir={workdir}", "--json=-", *flags]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_the_run_s_own_validation_documents_are_the_default(workdir, capsys):
    found = results(workdir, capsys)
    store = token_store.open(lm.load(workdir, step="newest").config.store)
    assert set(found) == {"long validation", "short validation", "all"}
    for source in store.sources:
        split, row = store.split(source, "validation"), found[f"{source} validation"]
        assert row["documents"] == len(split) > 0
        assert (row["bytes"], row["tokens"]) == (split.bytes.sum(), split.tokens_count - len(split))
    for key in ("documents", "tokens", "bytes", "nats"):
        assert found["all"][key] == pytest.approx(found["long validation"][key] + found["short validation"][key])


def test_a_stored_document_scores_as_its_text_does_and_as_one_pass_over_it(workdir, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    row = results(workdir, capsys, f"--data=text:{tmp_path}/a.txt")[f"text:{tmp_path}/a.txt"]
    model = lm.load(workdir, step="newest")
    tokens = [257, *TEXTS[0].encode(), 258]
    nats = -np.asarray(jax.nn.log_softmax(model.logits(tokens)[0]))[np.arange(len(tokens) - 1), tokens[1:]].sum()
    assert row["nats"] == pytest.approx(nats, rel=1e-5) and (row["bytes"], row["tokens"]) == (12, 13)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / 12, rel=1e-5)
    assert row["loss"] == pytest.approx(nats / 13, rel=1e-5) and row["perplexity"] == pytest.approx(
        math.exp(nats / 13), rel=1e-5
    )


def test_one_source_one_split_a_limit_and_a_stride_can_be_asked_for(workdir, capsys):
    path = lm.load(workdir, step="newest").config.store
    train = results(workdir, capsys, f"--data=store:{path}:long:train")
    assert set(train) == {"long train"}
    assert results(workdir, capsys, f"--data=store:{path}:long:train", "--limit=1")["long train"]["documents"] == 1
    closer = results(workdir, capsys, f"--data=store:{path}:long:train", "--stride=1")["long train"]
    assert closer["tokens"] == train["long train"]["tokens"] and closer["nats"] != train["long train"]["nats"]
    assert results(workdir, capsys, f"--data=store:{path}:short")["short validation"]["documents"] > 0


def test_the_table_and_the_file_say_the_same(workdir, tmp_path, capsys):
    assert evaluate.main([f"--workdir={workdir}", f"--json={tmp_path}/out.json"]) == 0
    table, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["results"]
    assert "bits per byte" in table and "long validation" in table
    for row in found.values():
        assert f"{row['loss']:.4f}" in table and f"{row['bits_per_byte']:.4f}" in table


def test_data_that_is_not_there_or_does_not_fit_is_a_mistake(workdir, tmp_path):
    path = lm.load(workdir, step="newest").config.store
    (tmp_path / "c.txt").write_text("abc")
    prepare(f"{tmp_path}/other", dict(c=f"text:{tmp_path}/c.txt"), dict(kind="characters"), validation=0.0, workers=1)
    for data, complaint in [
        ("text:nowhere.txt", "nowhere.txt"),
        ("txt:nowhere.txt", "did you mean 'text'"),
        (f"store:{path}:lon", "did you mean 'long'"),
        (f"store:{path}:long:trian", "did you mean 'train'"),
        (f"store:{tmp_path}/other::train", "another tokenizer"),
    ]:
        with pytest.raises(Mistake, match=complaint):
            evaluate.main([f"--workdir={workdir}", f"--data={data}"])
    for flags, complaint in [
        (["--batch=0"], "--batch=0 is not 1 or more"),
        (["--limit=0"], "--limit=0 is not 1 or more"),
        ([f"--json={tmp_path}/no/where.json"], "--json=.*: there is no folder .*/no"),
        ([f"--json={tmp_path}"], "--json=.*: it is a folder"),
    ]:
        with pytest.raises(Mistake, match=complaint):
            evaluate.main([f"--workdir={workdir}", *flags])
    with pytest.raises(Mistake, match="outside 1 to 0, the context"):
        evaluate.main([f"--workdir={workdir}", "--context=0"])
    with pytest.raises(Mistake, match="did you mean '--stride'"):
        evaluate.main([f"--workdir={workdir}", "--strid=2"])


def test_a_path_in_the_cloud_keeps_its_scheme():
    assert evaluate._parts("gs://bucket/store:docs:train") == ("gs://bucket/store", "docs", "train")
    assert evaluate._parts("data/docs") == ("data/docs", None, "validation")
