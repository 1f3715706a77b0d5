"""`jaxlm plan`: what a run will need and take on devices that are not here."""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import axes, chips, hlo, plan, step
from jaxlm.data.words import Words
from jaxlm.hlo import Operation
from jaxlm.lookup import Mistake
from jaxlm.nn import splash
from jaxlm.planning import costs
from jaxlm.planning.costs import CYCLES, KERNEL, Cost

pytest.importorskip("libtpu", reason="the extra `tpu` brings the compiler")

CONFIG = """
from ml_collections import ConfigDict
def get_config(size="full"):
    c = ConfigDict()
    c.steps, c.length, c.batch, c.store = 1_000, 256, 16, "nowhere"
    c.model = dict(name="llama", layers=2, width=256, heads=2, kv_heads=2, mlp_width=512, remat="full")
    c.prepare = dict(tokenizer=dict(vocab=512))
    c.optimizer = dict(name="adamw", lr=1e-3)
    c.mesh, c.accumulate = dict(data=1, fsdp=4), 1
    return c
"""


def test_a_plan_tells_memory_time_operations_and_what_is_sent(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    plan.main([f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2", "--price=1.5", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["devices"] == 4 and told["mesh"]["fsdp"] == 4
    assert (
        told["optimizer_bytes"] >= 2 * told["parameter_bytes"] >= 2 * told["parameters"]
    )  # 4 bytes each, on 4 devices
    assert told["parameter_bytes"] + told["temporary_bytes"] < told["peak_bytes"] < told["hbm_bytes"] == 16e9
    parts = told["compute_seconds"] + told["attention_seconds"] + told["exposed_seconds"]
    assert told["step_seconds"] == pytest.approx(parts) and min(told["compute_seconds"], told["attention_seconds"]) > 0
    assert told["roofline_seconds"] < told["step_seconds"] and 0 < told["mfu"] < 1
    assert told["tokens_per_second_per_device"] == pytest.approx(16 * 256 / 4 / told["step_seconds"])
    assert told["days"] == pytest.approx(1_000 * told["step_seconds"] / 86_400)
    assert told["dollars"] == pytest.approx(told["days"] * 24 * 4 * 1.5)
    assert len(told["operations"]) == 10 and any(op["source"].startswith("jaxlm/") for op in told["operations"])
    assert all(sent["axes"] == "fsdp" for sent in told["collectives"] if sent["kind"] != "collective-permute")


def test_a_tpu_is_told_to_gather_weights_unless_it_splits_tokens_or_the_user_has_a_say(monkeypatch):
    def told(where, **sizes):
        mesh = axes.mesh(data=1, **sizes, devices=where)
        with axes.on(mesh):
            return step._options(mesh)

    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    tpus = plan.devices("v5e:2x2")
    assert len(told(tpus, fsdp=4) or ()) == 2
    assert told(tpus, tensor=4) is told(tpus, sequence=4) is told(plan.devices("gpu:h100x4"), fsdp=4) is None
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_windowed_einsum_for_all_gather=true")
    assert told(tpus, fsdp=4) is None


def test_what_layers_hand_on_is_counted_once_however_many_they_are():
    """The inputs of 32 scanned layers are 0.54 GB, and each layer's three hidden states 0.81 together; the temporaries
    that the compiler tells have the former twice.
    """
    T, D, F, layers = 8192, 1024, 16384, 32

    def loss(x, w):
        layer = lambda x, w: (jnp.sin(jnp.sin(x @ w) @ w.T), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32).sum()

    place = jax.sharding.SingleDeviceSharding(plan.devices("v5e:2x2")[0])
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in ((T, D), (layers, D, F))]
    temporary, peak = costs.memory(jax.jit(jax.grad(loss, argnums=1)).lower(*args).compile(), "tpu")
    inputs, hidden, weights = 2 * layers * T * D, 2 * T * F, 2 * layers * D * F
    assert inputs + 2 * hidden < temporary < inputs + 3 * hidden
    assert temporary + 2 * weights <= peak < temporary + 2.1 * weights, "the weights, and their gradients"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.batch=0"], "config.batch=0 is not 1 or more"),
        (["--config.batch=7", "--config.accumulate=2"], "config.batch=7 is no multiple of config.accumulate=2"),
        (["--slices=0"], "--slices=0 is not 1 or more"),
        (["--price=-5"], "--price=-5.0 is not 0 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_before_anything_is_compiled(tmp_path, flags, message):
    (tmp_path / "config.py").write_text(CONFIG)
    with pytest.raises(Mistake, match=message):
        plan.main([f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2", *flags])


def test_rows_that_do_not_divide_over_the_devices_are_said(tmp_path, capsys, caplog):
    """Else it plans, without a word, that all devices compute the same rows."""
    (tmp_path / "config.py").write_text(CONFIG)
    with caplog.at_level("INFO", "jaxlm"):
        plan.main([f"--config={tmp_path / 'config.py'}", "--topology=cpu:4", "--config.batch=6", "--json"])
    assert "axis B of size 6 does not divide over fsdp=4; not split" in caplog.text


@pytest.mark.endurance  # large products take the compiler long
def test_what_does_not_fit_is_told_with_the_figures_and_what_to_do():
    model = dict(name="llama", size="llama2-7b", layers=2, remat="none")
    config = dict(model=model, optimizer=dict(name="adamw"), steps=1, batch=32, length=4096, mesh=dict(data=1, fsdp=4))
    with pytest.raises(Mistake, match=r"does not fit: the step needs [\d.]+G of the 15\.\d+G .* config\.batch"):
        plan.make(config, plan.devices("v5e:2x2"), words=Words.of_size(32_000))


@pytest.mark.parametrize(
    ("shape", "causal", "window", "share"),
    [((4096, 4096), True, None, 10 / 16), ((4096, 4096), False, None, 1.0), ((4096, 4096), True, 1024, 7 / 16),
     ((512, 512), True, None, 1.0)],
)  # fmt: skip
def test_attention_counts_the_blocks_that_the_kernel_computes(shape, causal, window, share):
    assert splash.seen(shape[0], shape[1], causal, window) == share


def test_an_attention_kernel_is_counted_with_and_without_an_axis_for_its_rows():
    def seconds(*rows):
        q, k = ((*rows, heads, 256, 128) for heads in (4, 2))
        inputs = (("s8", (1, 2, 2)), ("bf16", q), ("bf16", k), ("bf16", k), ("s32", (8, 256)))
        kernel = Operation("splash_mha_fwd.1", "custom-call", 1, 0, (("bf16", q),), inputs, "seen_0.7500/fwd", "")
        return Cost([kernel], None, chips.CHIPS["TPU v5 lite"], (2, 2, 1), 1).attention

    wanted = 2 * 2 * 4 * 256 * 256 * 128 * 0.75 / (KERNEL * 197e12)
    other = Operation("my_kernel.1", "custom-call", 1, 0, (), (), "", "")
    assert Cost([other], None, chips.CHIPS["TPU v5 lite"], (2, 2, 1), 1).uncounted == ["my_kernel.1"]
    assert seconds() == pytest.approx(wanted) and seconds(3) == pytest.approx(3 * wanted)


def test_a_product_by_expert_takes_its_floating_point_operations_or_what_its_blocks_read():
    """Blocks that hold the whole of D read each expert's weights once, others for every 128 rows anew."""

    def seconds(*tiling, rows=4096):
        inputs = (("s32", (1,)), ("bf16", (rows, 512)), ("bf16", (8, 512, 1024)))
        out = (("bf16", (rows, 1024)),)
        kernel = Operation("ragged-dot.1", "custom-call", 1, 0, out, inputs, "", "", rows=rows, tiling=tiling)
        cost = Cost([kernel], None, chips.CHIPS["TPU v5 lite"], (2, 2, 1), 1)
        assert not cost.uncounted and not cost.attention and cost.experts == cost.step
        return cost.step

    assert seconds(512, 512, 1024) == pytest.approx(2 * 4096 * 512 * 1024 / (KERNEL * 197e12))
    assert seconds(128, 256, 1024) == pytest.approx(2 * (4096 * 512 + 4096 / 128 * 512 * 1024) / 0.82e12)
    assert seconds(128, 512, 512, rows=16) == pytest.approx(2 * (2 * 16 * 512 + 8 * 512 * 1024) / 0.82e12)


def test_where_hosts_hold_something_a_compiled_program_needs_no_more_than_there_is():
    """The peak that is told is then the hosts'."""
    told = types.SimpleNamespace(
        argument_size_in_bytes=9, output_size_in_bytes=9, alias_size_in_bytes=8, temp_size_in_bytes=27,
        host_temp_size_in_bytes=34, peak_memory_in_bytes=44,
    )  # fmt: skip
    program: Any = types.SimpleNamespace(memory_analysis=lambda: told)
    assert costs.memory(program, "tpu", 32.0) == (22, 32) and costs.memory(program, "tpu", 95.0) == (27, 37)


@pytest.mark.parametrize("stride, slices, crosses", [(1, 1, False), (7, 1, False), (3, 2, False), (4, 2, True)])
def test_only_what_leaves_its_slice_takes_the_slow_network(stride, slices, crosses):
    """The last of a ring sends to the first, as far away as the ring is long, and stays in the slice."""
    sizes = (("bf16", (1000,)),)
    permute = Operation("permute.1", "collective-permute", 1, 0, sizes, (), "", "", group=2, stride=stride)
    chip = chips.CHIPS["TPU v5 lite"]
    mesh = types.SimpleNamespace(size=8, shape=dict(data=8))
    taken = Cost([permute], mesh, chip, (2, 4, 1), slices).exposed
    assert taken == 2000 / (chip.outside if crosses else chip.within(2, (2, 4, 1)))


def test_a_collective_of_all_devices_in_another_order_stays_in_the_one_slice():
    sizes, chip = (("bf16", (1000,)),), chips.CHIPS["TPU v5 lite"]
    gather = Operation("gather.1", "all-gather", 1, 0, sizes, (), "", "", group=8, stride=4)
    mesh = types.SimpleNamespace(size=8, shape=dict(data=8))
    assert Cost([gather], mesh, chip, (2, 4, 1), 1).exposed == 1750 / chip.within(8, (2, 4, 1))


def test_what_goes_to_the_hosts_takes_time_where_it_is_more_than_the_work_beside_it():
    sizes, chip = (("bf16", (15_000_000,)),), chips.CHIPS["TPU v5 lite"]  # 2 ms
    moves = [Operation("x", kind, 3, 0, sizes, (), "", "", begun=True, inside="body") for kind in hlo.HOST]

    def cost(where, chip=chip):
        work = Operation("fusion.1", "fusion", 3, 750_000, (), (), "", "", inside=where)  # half a ms
        return Cost([work, *moves], None, chip, (2, 4, 1), 1)

    beside, elsewhere = cost("body"), cost("entry")
    assert (beside.moved, beside.hosted) == (2 * 3 * 30e6, pytest.approx(12e-3))
    assert beside.exposed == pytest.approx(6e-3 - 3 * CYCLES * 0.5e-3), "both ways at once"
    assert elsewhere.exposed == pytest.approx(6e-3), "not while a loop waits"
    unknown = cost("body", dataclasses.replace(chip, host=0.0))
    assert (unknown.moved, unknown.hosted, unknown.exposed) == (beside.moved, None, 0)
