"""The training promises: the same command resumes bit for bit, on any mesh; nothing silently wrong is trained."""

import json
from pathlib import Path
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from jaxlm import checkpoint, config, objectives, prepare, train
from jaxlm.data import tokenizers
from jaxlm.data.store import open as open_store
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake, spend
from jaxlm.models import Blueprint
from jaxlm.nn.loss import Sums
from tests.runs import STEPS, arrays, losses, run, settings, start, two_processes, write_store

pytestmark = pytest.mark.xdist_group("train")  # in one process, which makes `whole` once


def damage_a_byte(folder: Path):
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two sources of short and long documents, held-out ones included."""
    return write_store(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """A run of all its steps at once."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(str(workdir), store=store, **settings())
    return workdir


def test_a_run_in_two_parts_ends_in_the_same_bits(store, whole, tmp_path):
    """With packing, a mixture, dropout, accumulation and a moving average on."""
    train.train(str(tmp_path), store=store, **settings(steps=5))
    train.train(str(tmp_path), store=store, **settings())
    for one, two in zip(arrays(whole), arrays(tmp_path), strict=True):
        np.testing.assert_array_equal(one, two)
    assert losses(whole) == losses(tmp_path)


def test_it_learns_and_writes_what_a_workdir_holds(store, whole):
    train_lines = [
        line for line in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "eval" not in line
    ]
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] - 0.3
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "skipped", "wait_s"} <= train_lines[-1].keys()
    assert list((whole / "events").iterdir()) and (whole / "report.html").stat().st_size > 10_000
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["parameters"] > 0 and 0 < summary["validation_bits_per_byte"] < 8


def test_the_share_of_the_time_that_steps_wait_for_data_is_told(whole):
    logged = [x for x in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "eval" not in x]
    assert all(0 <= line["wait_share"] <= 1 and line["wait_s"] >= 0 for line in logged)
    assert "of the time waiting for data" in (whole / "report.html").read_text()


def test_each_source_is_evaluated_by_itself(store, whole):
    evaluated = [x for x in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "eval" in x]
    last = {x["eval"]: x for x in evaluated if x["step"] == STEPS}
    assert set(last) == {"lists", "prose"} and all({"loss", "bits_per_byte"} <= x.keys() for x in last.values())
    summary = json.loads((whole / "summary.json").read_text())
    for key in ("loss", "bits_per_byte"):
        assert last["lists"][key] != last["prose"][key]
        assert summary[f"validation_{key}"] == pytest.approx(np.mean([x[key] for x in last.values()]))


def test_a_finished_run_trains_no_further(store, whole):
    before = arrays(whole)
    train.train(str(whole), store=store, **settings())
    for one, two in zip(before, arrays(whole), strict=True):
        np.testing.assert_array_equal(one, two)


def test_another_seed_is_another_run(store, whole, tmp_path):
    train.train(str(tmp_path), store=store, **settings(seed=1, steps=2))
    assert losses(whole)[0] != losses(tmp_path)[0] and losses(whole)[1] != losses(tmp_path)[1]


@pytest.mark.endurance
@pytest.mark.parametrize("mesh", [dict(data=8), dict(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_it_resumes_on_eight_devices_with_the_same_losses(store, whole, tmp_path, mesh):
    train.train(str(tmp_path), store=store, **settings(steps=5))
    train.train(str(tmp_path), store=store, **settings(mesh=mesh))
    np.testing.assert_allclose(losses(tmp_path), losses(whole), atol=1e-5)


@pytest.mark.endurance
def test_it_resumes_on_two_processes_with_the_same_losses(store, whole, tmp_path):
    train.train(str(tmp_path), store=store, **settings(steps=5))
    two_processes(tmp_path, store)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), atol=1e-5)


@pytest.mark.endurance
def test_sigterm_saves_says_so_and_exits_with_zero(store, whole, tmp_path):
    process = start(tmp_path, store)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or '"step": 3' not in metrics.read_text():
        time.sleep(0.05)
        assert process.poll() is None, process.output()
    process.send_signal(signal.SIGTERM)
    output = process.finished()
    assert process.returncode == 0 and "saved at step" in output, output
    assert "going on after step" in run(tmp_path, store)
    for one, two in zip(arrays(whole), arrays(tmp_path), strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_evaluation_that_a_signal_cuts_short_is_neither_logged_nor_ranks_a_checkpoint(store, tmp_path, monkeypatch):
    real, stops = train._measure, []

    def cut_short(*args):
        if not stops:  # the signal comes within the first evaluation
            stops.append(args[-1])
            args[-1].asked = True
        return real(*args)

    monkeypatch.setattr(train, "_measure", cut_short)
    train.train(str(tmp_path), store=store, **settings())
    assert not [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        assert max(checkpoints.steps()) == 6, "the step that was to be evaluated is saved at once"
        assert checkpoints.best() is None
    train.train(str(tmp_path), store=store, **settings())
    evaluations = [x for x in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "eval" in x]
    assert [x["step"] for x in evaluations] == [STEPS] * 2


def test_a_damaged_newest_checkpoint_is_skipped_and_its_step_saved_anew(store, whole, tmp_path, caplog):
    run = shutil.copytree(whole, tmp_path / "run")
    damage_a_byte(run / "checkpoints" / str(STEPS) / "params")
    train.train(str(run), store=store, **settings())
    assert f"checkpoint of step {STEPS} is damaged" in caplog.text
    assert losses(whole) == losses(run)
    assert len(list((run / "checkpoints").glob(f"{STEPS}.damaged-*"))) == 1, "nothing is thrown away"
    for one, two in zip(arrays(whole), arrays(run), strict=True):
        np.testing.assert_array_equal(one, two)


def test_when_every_checkpoint_is_damaged_it_says_so_and_touches_nothing(store, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        if folder.name.isdigit():
            damage_a_byte(folder / "params")
    with pytest.raises(Mistake, match="no checkpoint can be used"):
        train.train(str(run), store=store, **settings())


def test_restored_parameters_are_the_moving_average(store, whole):
    blueprint = Blueprint.of(settings()["model"], vocab=prepare.token_store.open(store).vocab)
    step, params = checkpoint.restore_params(str(whole), blueprint.shapes)
    assert step == STEPS
    state = dict(zip(["ema", "params"], [params, checkpoint_part(whole, "params", blueprint.shapes)]))
    differs = jax.tree.map(lambda a, b: not np.array_equal(a, b), state["ema"], state["params"])
    assert any(jax.tree.leaves(differs))


def checkpoint_part(workdir, part, shapes):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        return checkpoints.restore({part: shapes})[1][part]


@pytest.mark.endurance
def test_a_run_begins_with_text_vectors_as_large_as_the_familys_own(store, tmp_path, capsys):
    """On any mesh; a resumed run does not look at the file."""
    file, rng = tmp_path / "vectors.txt", np.random.default_rng(0)
    rows = {letter: rng.normal(size=32) * 7 for letter in "abcd"}
    file.write_text("".join(f"{letter} {' '.join(map(str, row))}\n" for letter, row in rows.items()))
    still = dict(optimizer=dict(name="sgd", lr=0.0), init=dict(vectors=str(file)), mesh=dict(fsdp=2, tensor=4))
    train.train(str(tmp_path / "run"), store=store, **settings(steps=1, **still))
    assert "8 of 259 tokens begin with a text vector" in capsys.readouterr().out, "A to D, and a to d"
    blueprint = Blueprint.of(settings()["model"], vocab=259)
    fresh = np.asarray(blueprint.init(0)["embed_VD"])
    got = np.asarray(checkpoint_part(tmp_path / "run", "params", blueprint.shapes)["embed_VD"])
    ids = [ord(letter) for letter in "ABCDabcd"]
    want = np.stack([*rows.values()] * 2)
    want *= np.sqrt((fresh**2).mean() / (want**2).mean())
    np.testing.assert_allclose(got[ids], want, rtol=1e-4)
    np.testing.assert_array_equal(np.delete(got, ids, 0), np.delete(fresh, ids, 0))
    file.unlink()
    train.train(str(tmp_path / "run"), store=store, **settings(steps=2, **still))
    with pytest.raises(Mistake, match="no file matches"):
        train.train(str(tmp_path / "another"), store=store, **settings(steps=1, **still))
    assert not (tmp_path / "another" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=dict(name="lama")), "did you mean 'llama'"),
        (dict(model=dict(name="llama", layer=2)), "config.model has no 'layer'; did you mean 'layers'"),
        (dict(optimizer=dict(name="adamww")), "did you mean 'adamw'"),
        (dict(optimizer=dict(warm_up=3)), "did you mean 'warmup'"),
        (dict(data=dict(packing="bestfit")), "did you mean 'best_fit'"),
        (dict(data=dict(weights=dict(pros=1.0))), "did you mean 'prose'"),
        (dict(data=dict(temprature=2.0)), "config.data has no 'temprature'; did you mean 'temperature'"),
        (dict(data=dict(cap="many")), "config.data.cap is a number or None, not 'many'"),
        (dict(data=dict(epochs=0.1)), "data.epochs: after .* no source is left, and the run asks for more"),
        (dict(data=dict(schedule=[(0, dict(prose=1.0)), (5, dict(list=1.0))])), "from step 5: .*did you mean 'lists'"),
        (dict(mesh=dict(fsdp=3)), "does not fit 8 devices"),
        (dict(mesh=dict(tensors=3)), "did you mean 'tensor'"),
        (dict(mesh=dict(stage=4)), "config.mesh.stage=4 does not divide the 2 layers of"),
        (dict(mesh=dict(data=1, stage=2), pipeline=dict(microbatches=3)), "microbatches=3: .* on stage go into 2"),
        (dict(mesh=dict(data=1, stage=2), pipeline=dict(repeat=2)), "did you mean 'repeats'"),
        (dict(accumulate=3), "no multiple of config.accumulate"),
        (dict(model=dict(name="llama", vocab=100)), "config.model.vocab is 100"),
        (dict(objective=dict(name="clm", label_smooting=0.1)), "did you mean 'label_smoothing'"),
        (dict(every=dict(logs=1)), "did you mean 'log'"),
        (dict(guard=dict(patient=1)), "did you mean 'patience'"),
        (dict(checkpoint=dict(newst=1)), "did you mean 'newest'"),
        (dict(rules=dict(D="model")), "has no 'model'"),
        (dict(init=dict(vector="glove.txt")), "did you mean 'vectors'"),
        (dict(batches=3), "did you mean 'batch'"),
        (dict(steps=None), "config.steps is a whole number, not None"),
        (dict(steps=0), "config.steps=0 is not between 1 and 2147483647"),
        (dict(batch=0), "config.batch=0 is not 1 or more"),
        (dict(batch=-8), "config.batch=-8"),
        (dict(accumulate=0), "config.accumulate=0"),
        (dict(length=0), "config.length=0"),
        (dict(seed=-1), "config.seed=-1 is not between 0 and 4294967295"),
        (dict(ema="abc"), "config.ema is a number, not 'abc'"),
        (dict(ema=1.0), "config.ema=1.0 is the share"),
        (dict(dtype="float99"), "dtype has no 'float99'; did you mean 'float32'"),
        (dict(model="llama"), "config.model is a section or None, not 'llama'"),
        (dict(model=settings()["model"] | dict(layers=0)), "config.model.layers=0 is not 1 or more"),
        (dict(model=settings()["model"] | dict(width=-32)), "config.model.width=-32"),
        (dict(model=settings()["model"] | dict(heads=0)), "config.model.heads=0"),
        (dict(model=settings()["model"] | dict(kv_heads=3)), "heads=4 is no multiple of kv_heads=3"),
        (dict(model=settings()["model"] | dict(dropout=1.5)), "config.model.dropout=1.5"),
        (dict(model=settings()["model"] | dict(dropout=-0.1)), "config.model.dropout=-0.1"),
        (dict(model=settings()["model"] | dict(tied="no")), "config.model.tied is True or False, not 'no'"),
        (dict(model=dict(name="gpt2", width=30, heads=4)), "width=30 is no multiple of heads=4"),
        (dict(model=settings()["model"] | dict(head_width=7)), "config.model.head_width=7 is odd"),
        (dict(model=settings()["model"] | dict(rope_scaling="x")), "rope_scaling is a section with kind and factor"),
        (dict(objective=dict(name="clm", z_loss="x")), "config.objective.z_loss is a number, not 'x'"),
        (dict(objective=dict(name="clm", label_smoothing=3.0)), "config.objective.label_smoothing=3.0 is not between"),
        (dict(every=dict(eval=-1)), "config.every.eval=-1 is not 0 or more"),
        (dict(checkpoint=dict(best=-1)), "config.checkpoint.best=-1 is not 0 or more"),
        (dict(checkpoint=dict(mode="mx")), "config.checkpoint.mode has no 'mx'; did you mean 'max'"),
        (dict(checkpoint=dict(metric="los")), "config.checkpoint.metric has no 'los'; did you mean 'loss'"),
        (dict(checkpoint=dict(metric="pros/loss")), "did you mean 'prose/loss'"),
        (dict(samples=dict(prompt=["a"])), "did you mean 'prompts'"),
        (dict(samples=dict(prompts="a")), "config.samples.prompts is a list, each a text, not 'a'"),
        (dict(samples=dict(prompts=[3])), r"config.samples.prompts is a list, each a text, not \[3\]"),
        (dict(samples=dict(prompts=["a"], tokens=0)), "config.samples.tokens=0"),
        (dict(samples=dict(prompts=["a"], temperature=-1)), "config.samples.temperature=-1"),
        (dict(samples=dict(prompts=["a" * 5000])), "leaves no room in the model's context"),
        (dict(guard=dict(patience=0)), "config.guard.patience=0"),
        (dict(evaluation=dict(documents=0)), "config.evaluation.documents=0"),
    ],
    ids=str,
)
def test_a_mistake_in_the_config_is_answered_before_the_first_step(store, tmp_path, change, message):
    with pytest.raises(Mistake, match=message):
        spend("config", train.train, settings() | change, str(tmp_path), store=store)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_a_run_that_is_past_the_steps_asked_for_says_so_and_is_left_alone(store, whole):
    before = {name: (whole / name).read_text() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(Mistake, match=rf"is at step {STEPS} already, past config.steps={STEPS - 1}"):
        train.train(str(whole), store=store, **settings(steps=STEPS - 1))
    assert {name: (whole / name).read_text() for name in before} == before


def test_without_a_step_to_log_at_only_the_last_is_logged(store, tmp_path):
    train.train(str(tmp_path), store=store, **settings(steps=2, every=dict(log=0)))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "tokens_per_s" in line] == [2]


def test_a_workdir_of_another_model_is_refused_and_left_alone(store, whole):
    before = (whole / "config.json").read_text()
    other = settings()["model"] | {"width": 64}
    with pytest.raises(Mistake, match=r"holds checkpoints of another run: config.model.width was 32 and is 64"):
        train.train(str(whole), store=store, **settings(model=other))
    assert (whole / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "key"),
    [(dict(weight_decay=0.0), "weight_decay was 0.1 and is 0.0"), (dict(mu_dtype="bfloat16"), "mu_dtype was None")],
    ids=str,
)
def test_an_optimizer_that_keeps_something_else_is_refused_by_the_key_that_says_so(store, whole, change, key):
    optimizer = settings()["optimizer"] | dict(lr=2e-2, schedule="cosine", b1=0.8) | change
    with pytest.raises(Mistake, match=f"another run: config.optimizer.{key}"):
        train.train(str(whole), store=store, **settings(optimizer=optimizer))


def test_how_a_model_is_computed_may_change_on_the_way(store, whole, tmp_path):
    """What moves with a run to other devices: none of it is another model."""
    run = shutil.copytree(whole, tmp_path / "run")
    model = settings()["model"] | dict(remat="full", attention="chunked", dropout=0.2, tied=False)
    train.train(str(run), store=store, **settings(steps=STEPS + 1, model=model))
    assert losses(run)[:STEPS] == losses(whole) and len(losses(run)) == STEPS + 1


def test_a_rate_a_clip_and_a_decay_of_another_size_are_gone_on_with(store, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    optimizer = settings()["optimizer"] | dict(lr=2e-2, clip=0.0, weight_decay=0.2, schedule="linear", b1=0.8)
    train.train(str(run), store=store, **settings(steps=STEPS + 1, optimizer=optimizer))
    assert json.loads((run / "config.json").read_text())["steps"] == STEPS + 1


def test_a_workdir_of_weights_alone_is_no_run_to_go_on_with(store, tmp_path):
    config.write(dict(model=settings()["model"], dtype="auto"), str(tmp_path))
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(0, dict(params=Blueprint.of(settings()["model"], vocab=259).init(0)))
    with pytest.raises(Mistake, match=r"was made by `jaxlm convert`.*Choose another --workdir"):
        train.train(str(tmp_path), store=store, **settings())


@pytest.mark.parametrize("damage", ['{"model": ', "\udcff", "[1]", "5"])
def test_damaged_files_of_a_workdir_are_told_or_left_out(store, whole, tmp_path, damage):
    run = shutil.copytree(whole, tmp_path / "run")
    damage = damage.encode(errors="surrogateescape")
    (run / "config.json").write_bytes(damage)
    with pytest.raises(Mistake, match=r"config\.json (is not JSON|holds no JSON object)"):
        train.train(str(run), store=store, **settings())
    shutil.copy(whole / "config.json", run / "config.json")
    for name in ("metrics.jsonl", "summary.json", "command", "samples.jsonl"):
        (run / name).write_bytes(damage + b"\n")
    train.train(str(run), store=store, **settings(steps=STEPS + 1))
    assert json.loads((run / "summary.json").read_text())["parameters"] > 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {STEPS + 1} and (run / "report.html").exists()


def test_parameters_that_are_no_numbers_are_not_saved(store, tmp_path):
    """What an optimizer makes of finite gradients, in steps that the guard takes."""
    optimizer = dict(name="adam", lr=1e-3, eps_root=0.0, eps=0.0, b2=0.0, schedule="constant")
    with pytest.raises(Mistake, match="step 2: parameters are not finite, though the gradients were"):
        train.train(str(tmp_path), store=store, **settings(steps=2, optimizer=optimizer, every=dict(save=2)))
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_what_only_an_objective_counts_may_rank_checkpoints(store):
    tokens = open_store(store)
    task = objectives.of(None, length=32, words=Words.of(tokens.tokenizer()), kind="decoder")
    count = jax.numpy.zeros(())
    measure = lambda params, batch: Sums(count, count, count, count, {"follows": (count, count)})  # noqa: E731
    held_out = train._held_out(tokens, task)
    for metric in ("follows", "lists/follows", "prose/loss"):
        train._check_metric(metric, measure, {}, held_out, task)
    with pytest.raises(Mistake, match=r"config.checkpoint.metric has no 'folows'; did you mean 'follows'"):
        train._check_metric("folows", measure, {}, held_out, task)


def test_a_store_of_another_tokenizer_is_not_gone_on_with(store, whole, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "tokenizer")
    tokenizers.train([], dict(kind="bytes", extra=["<other>"])).save(copy / "tokenizer")
    before = (whole / "tokenizer" / "spec.json").read_text()
    with pytest.raises(Mistake, match="the same ids would mean other tokens"):
        train.train(str(whole), store=str(copy), **settings())
    assert (whole / "tokenizer" / "spec.json").read_text() == before


@pytest.mark.parametrize("named", [["prose"], ["prose", "lists", "more"]], ids=["one fewer", "one more"])
def test_a_store_with_other_sources_than_the_config_names_is_not_mixed_without_a_word(store, tmp_path, named):
    asked = settings(prepare=dict(sources=dict.fromkeys(named, "text:a.txt")), data=None)
    names = ", ".join(sorted(named))
    with pytest.raises(Mistake, match=f"holds the sources lists, prose, and config.prepare.sources names {names}:"):
        train.train(str(tmp_path), store=store, **asked)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_store_is_never_trained_on(store, tmp_path):
    manifest = Path(store) / "prose" / "manifest.json"
    manifest.rename(manifest.with_suffix(".away"))
    try:
        with pytest.raises(Mistake, match="jaxlm prepare"):
            train.train(str(tmp_path), store=store, **settings())
    finally:
        manifest.with_suffix(".away").rename(manifest)


def test_the_command_line_answers_a_typo_in_one_line(store, tmp_path):
    output = run(tmp_path, store, "--config.optimizer.warmpu=3", check=2)
    assert "config.optimizer has no 'warmpu'; did you mean 'warmup'" in output
    assert "Traceback" not in output
