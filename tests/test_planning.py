"""What `jaxlm plan` says without a compiler, of serving, and in a search."""

import dataclasses
import json

import jax
import pytest
from rich.console import Console

from jaxlm import axes, plan
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.planning import arithmetic, forecast, serving

LLAMA = dict(name="llama", layers=2, width=64, heads=4, kv_heads=4, head_width=16, mlp_width=128, context=256)
CONFIG = dict(
    model=LLAMA, optimizer=dict(name="adamw", lr=1e-3), steps=10, batch=32, length=128, mesh=dict(data=1, fsdp=8)
)
WORDS = Words.of_size(512)


def counted(topology="gpu:h100x8", remat="none"):
    return plan.make({**CONFIG, **remat_of(remat)}, arithmetic.devices(topology), words=WORDS)


def remat_of(policy):
    return dict(model=dict(LLAMA, remat=policy))


def test_a_topology_of_gpus_has_hosts_of_eight_and_an_unknown_one_is_told_the_kinds():
    where = arithmetic.devices("gpu:h100x16")
    assert len(where) == 16 and arithmetic.hosts(where) == 2 and where[8].device_kind == "NVIDIA H100"
    assert arithmetic.hosts(arithmetic.devices("cpu:8")) == 1
    with pytest.raises(Mistake, match=r"h10.*a100.*h100"):
        arithmetic.devices("gpu:h10x8")
    for wrong in ("gpu:h100", "cpu:0", "gpu:x8"):
        with pytest.raises(Mistake, match="gpu:h100x8"):
            arithmetic.devices(wrong)


def test_arithmetic_tells_what_a_compiled_step_is_given():
    told = counted("cpu:8")
    memory = plan.compile_step(CONFIG, jax.devices()[:8], words=WORDS)[1].memory_analysis()
    assert memory is not None
    assert told.parameter_bytes + told.optimizer_bytes + told.batch_bytes == memory.argument_size_in_bytes
    assert told.peak_bytes > memory.argument_size_in_bytes and not told.compiled
    assert told.step_seconds is told.roofline_seconds is told.tokens_per_second_per_device is None, "no CPU has a peak"


def test_more_is_kept_for_the_backward_pass_where_less_is_computed_again():
    kept = [counted(remat=policy).temporary_bytes for policy in ("full", "dots", "none")]
    assert kept == sorted(kept) and kept[0] < kept[1] < kept[2]
    layers = 2 * 32 * 128 * 64 * 2 / 8  # each layer's input, in bfloat16, on one of eight devices
    gradients = Blueprint.of(LLAMA, vocab=512).size * 4 / 8
    head = 512 * 64 * (2 + 4) + 32 // 8 * 128 * 512 * (4 + 2)  # and its gradient, logits and theirs
    assert layers < kept[0] - gradients - head < 12 * layers
    assert kept[0] - counted(remat="offload").temporary_bytes == layers, "which the hosts have"


def test_while_the_loss_is_computed_a_device_has_the_head_its_gradient_and_a_chunk_of_logits():
    def room(**mesh):
        config, words = {**CONFIG, "mesh": mesh}, Words.of_size(V)
        run = plan.assemble(config, arithmetic.devices("gpu:h100x8"), words=words)
        return arithmetic.at_the_head(run.parts, 32, 128, run.mesh, run.rules)

    V, D, tokens = 65_536, 64, 32 // 8 * 128
    assert room(data=1, fsdp=8) == room(data=8) == V * D * (2 + 4) + tokens * V * (4 + 2)
    assert room(data=1, tensor=8) == (V * D * (2 + 4) + 8 * tokens * V * (4 + 2)) / 8


def sends(topology, **sizes):
    """By collective and axis."""
    where = arithmetic.devices(topology)
    run = plan.assemble({**CONFIG, "mesh": sizes}, where, words=WORDS)
    return {(row["kind"], row["axes"]): row for row in arithmetic.sends(run.parts, CONFIG, where, run.mesh)}


def test_parameters_split_by_fsdp_are_gathered_twice_and_their_gradients_scattered():
    sent = sends("gpu:h100x8", data=1, fsdp=8)
    gathered, scattered = sent["all-gather", "fsdp"], sent["reduce-scatter", "fsdp"]
    parameters = Blueprint.of(LLAMA, vocab=512).size * 2  # in bfloat16
    assert gathered["bytes"] == 2 * scattered["bytes"] == pytest.approx(2 * 7 / 8 * parameters, rel=0.02)
    assert gathered["seconds"] == pytest.approx(gathered["bytes"] / 450e9)


def test_what_lies_on_several_hosts_is_sent_over_the_network():
    sent = sends("gpu:h100x16", data=4, tensor=4)
    assert sent["all-reduce", "data"]["seconds"] == pytest.approx(sent["all-reduce", "data"]["bytes"] / 50e9)
    tokens = 32 // 4 * 128 * 64 * 2  # a device's rows as tensor gathers them, in bfloat16
    passes = 2 * 2 * 2  # forward and backward, two halves of each of two layers
    assert sent["all-gather", "tensor"]["bytes"] == passes * tokens * 3 / 4
    assert sent["all-gather", "tensor"]["seconds"] == pytest.approx(passes * tokens * 3 / 4 / 450e9)


def test_a_bound_is_no_prediction_and_is_printed_as_what_it_is(capsys, tmp_path):
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict({CONFIG}, store='none',"
        "prepare=dict(tokenizer=dict(vocab=512))))\n"
    )
    command = [f"--config={tmp_path / 'config.py'}", "--topology=gpu:h100x8"]
    plan.main([*command, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["step_seconds"] is told["mfu"] is None and told["roofline_seconds"] > 0
    most = 32 * 128 / 8 / told["roofline_seconds"]
    assert told["tokens_per_second_per_device"] == pytest.approx(most)
    plan.main(command)
    said = " ".join(capsys.readouterr().out.split())
    assert "at most" in said and "at least" in said and "Neither is a prediction" in said and "MFU" not in said


def test_of_experts_kernels_it_is_said_that_their_time_is_an_assumption(capsys):
    for seconds, told in ((0.5, True), (None, False)):
        forecast.show(dataclasses.replace(counted(), expert_seconds=seconds), Console())
        said = " ".join(capsys.readouterr().out.split())
        assert ("Experts' kernels" in said and "65% of the peak" in said and "None of it was measured" in said) == told


def test_a_host_reads_the_rows_that_its_own_devices_hold():
    where = arithmetic.devices("gpu:h100x16")
    rows = lambda **sizes: arithmetic.host_rows(32, axes.mesh(**sizes, devices=where))  # noqa: E731
    assert rows(data=1, tensor=16) == 32 and rows(data=1, fsdp=16) == rows(data=2, tensor=8) == 16
    assert rows(data=4, tensor=4) == 16, "devices that share rows read them once"


def serve(topology, mesh, **changed):
    how = dict(rows=8, prompt=100, new=28) | changed
    return serving.make({**CONFIG, "mesh": mesh}, plan.devices(topology), words=WORDS, **how)


def test_a_token_is_bound_by_reading_the_weights_and_the_cache_once():
    told = serve("gpu:h100x4", dict(data=1, tensor=4))
    slots = 128
    held = 2 * 2 * 8 * 4 * slots * 16 * 2 / 4  # keys and values, layers, rows, heads, slots, width
    assert told.cache_bytes == held + held / slots + 8 * 4  # the token that is being read, and how long each row is
    looked_up = 512 * 64 / 4  # of the table of embeddings
    weights = told.parameter_bytes - looked_up * 2  # in the dtype of products
    filled = told.cache_bytes * (100 + 14) / slots
    assert told.token_roofline_seconds == pytest.approx((weights + filled) / 3.35e12)
    assert told.bound_by == "reading weights and cache" and told.token_seconds is None
    here = serving.make(CONFIG, jax.devices()[:8], words=WORDS, rows=8, prompt=100, new=28)
    assert here.token_roofline_seconds is serve("cpu:8", dict(data=8)).token_roofline_seconds is None


def test_what_cannot_be_served_is_told_before_anything_is_compiled():
    with pytest.raises(Mistake, match=r"--prompt=300 and --new=28 .* 256"):
        serve("gpu:h100x4", dict(data=1, tensor=4), prompt=300)
    with pytest.raises(Mistake, match="bert is an encoder"):
        config = {**CONFIG, "model": dict(name="bert", layers=1, width=32, heads=2, mlp_width=64)}
        serving.make(config, arithmetic.devices("gpu:h100x8"), words=WORDS, rows=1, prompt=8, new=8)


@pytest.mark.endurance  # libtpu's programs are never read back from a cache
def test_serving_compiles_the_engines_programs_with_a_cache_split_by_heads():
    pytest.importorskip("libtpu", reason="the extra `tpu` brings the compiler")
    told = serve("v5e:2x2", dict(data=1, tensor=4))
    assert told.cache_bytes == serve("gpu:h100x4", dict(data=1, tensor=4)).cache_bytes
    assert told.peak_bytes > told.parameter_bytes + told.cache_bytes
    assert told.token_seconds and told.prefill_seconds
    assert told.prefill_seconds > (told.prefill_roofline_seconds or 0.0)
    assert told.token_seconds > (told.token_roofline_seconds or 0.0)
    assert told.tokens_per_second_per_device == pytest.approx(8 / told.token_seconds / 4)
    assert (told.options_seconds or 0.0) > 0.0, "what few rows ask for is told apart"
    assert any(row["source"].startswith("jaxlm/") for row in told.operations)


def test_a_search_compiles_no_more_than_it_may_and_says_how_far_it_is():
    where = arithmetic.devices("gpu:h100x2")
    found = list(plan.search({**CONFIG, "batch": 4}, where, words=WORDS, tries=3))
    plans, said = [x for x in found if not isinstance(x, str)], [x for x in found if isinstance(x, str)]
    assert len(plans) == 3 and len(said) == 5
    assert "candidates" in said[1] and said[-1].startswith("3 of 3, ") and "fits" in said[-1]


def test_a_search_puts_more_rows_first_as_gradients_are_summed_once_a_step():
    found = plan.candidates({**CONFIG, "batch": 64}, arithmetic.devices("gpu:h100x8"), words=WORDS)
    rows = [one.config["batch"] for one in found if one.split == (8, 1, "full")]
    assert rows == [128, 64, 32]


def test_a_search_keeps_the_axes_that_it_does_not_vary():
    config = {**CONFIG, "batch": 8, "mesh": dict(data=2, sequence=2)}
    found = plan.candidates(config, arithmetic.devices("gpu:h100x4"), words=WORDS)
    assert found and all(one.config["mesh"]["sequence"] == 2 for one in found)


def test_a_config_without_a_mesh_is_planned_as_it_is_trained():
    told = plan.make({**CONFIG, "batch": 8, "mesh": None, "rules": None}, arithmetic.devices("gpu:h100x4"), words=WORDS)
    assert told.mesh["data"] == 4


def test_a_search_leaves_out_what_is_too_large_and_stops_growing_what_did_not_fit(monkeypatch):
    tried = []

    def fails(config, where, **more):
        tried.append((config["model"]["remat"], config["batch"]))
        raise Mistake("does not fit: it is large. Try less")

    def candidates(config, where, **more):
        made = lambda remat, batch, gb: plan.Candidate(  # noqa: E731
            f"{remat} {batch}", (2, 1, remat), {**CONFIG, "batch": batch, **remat_of(remat)}, gb * 1e9, 1.0 / batch
        )
        return [made("none", 8, 200), made("full", 4, 70), made("full", 8, 75), made("full", 2, 60)]

    monkeypatch.setattr(plan, "make", fails)
    monkeypatch.setattr(plan, "candidates", candidates)
    said = list(map(str, plan.search(CONFIG, arithmetic.devices("gpu:h100x2"), words=WORDS, tries=100)))
    assert tried == [("full", 4), ("full", 2)] and "4 candidates, 1 too large" in said[1]
    assert said[-1].endswith("full 2: does not fit: it is large")
