"""The training step: denominators over the whole batch, steps that are skipped, moving averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import axes, step
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn.loss import Sums
from jaxlm.objectives import clm

V, T, B = 17, 6, 8
MODEL = dict(name="llama", layers=1, width=8, heads=2, kv_heads=2, head_width=4, mlp_width=16)


@pytest.fixture(scope="module")
def blueprint():
    return Blueprint.of(MODEL, vocab=V)


@pytest.fixture(scope="module")
def batch():
    """Rows with very different numbers of real tokens."""
    rng = np.random.default_rng(0)
    segments = np.asarray([[1] * n + [0] * (T + 1 - n) for n in (7, 7, 2, 2, 2, 7, 2, 0)])
    rows = [{"tokens": rng.integers(0, V, T + 1), "segments": row} for row in segments]
    examples = [clm.features(row) for row in rows]
    return {name: jnp.asarray(np.stack([x[name] for x in examples])) for name in examples[0]}


@functools.cache
def fresh(dropout=0.0):
    return Blueprint.of(MODEL | {"dropout": dropout}, vocab=V).init(0)


def run(blueprint, batches, tx=None, loss=clm.loss, **options):
    """The states after each batch, and the metrics."""
    tx = tx or optax.sgd(0.1)
    update = jax.jit(step.make(blueprint, tx, loss, seed=0, **options))
    states, metrics = [step.init(tx, fresh(blueprint.config.dropout), ema=options.get("ema", 0.0))], []
    for one in batches:
        state, found = update(states[-1], one)
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


@pytest.fixture(scope="module")
def once(blueprint, batch):
    return run(blueprint, [batch])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_divides_by_the_real_tokens_of_the_whole_batch(blueprint, batch, once, parts):
    """Not by each part's own, which would weigh a token by how many neighbours it has; one part here has none."""
    (_, whole), (want,) = once
    (_, summed), (got,) = run(blueprint, [batch], accumulate=parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), summed["params"], whole["params"])
    assert got["tokens"] == want["tokens"] == batch["weights"].sum()
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)


def test_the_loss_is_the_mean_over_real_tokens(blueprint, batch, once):
    _, (metrics,) = once
    logits, _ = jax.jit(lambda p: blueprint.bind(p)(batch["tokens"], segments_BT=batch["segments"]))(fresh())
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]
    real = np.asarray(batch["weights"]) > 0
    assert metrics["loss"] == pytest.approx(float(np.asarray(nll)[real].mean()), rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_devices_of_a_cpu_sum_once_and_make_of_uneven_rows_what_one_makes(blueprint, batch, parts):
    """Their rows have 12, 2, 8 and 1 real tokens."""
    (_, want), (metrics,) = run(blueprint, [batch], optax.adam(1e-2), accumulate=parts, ema=0.5)
    tx, mesh = optax.adam(1e-2), axes.mesh(data=4)
    with axes.on(mesh):
        update = jax.jit(step.make(blueprint, tx, clm.loss, seed=0, accumulate=parts, ema=0.5, apart=True))
        state = jax.device_put(step.init(tx, fresh(), ema=0.5), jax.NamedSharding(mesh, jax.P()))
        placed = axes.put(jax.device_get(batch), B, mesh)
        text = update.lower(state, placed).compile().as_text()
        got, found = update(state, placed)
    assert text.count(" all-reduce(") == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, metrics)


def poisoned(value):
    """A loss that comes out wrong for batches marked by a first token of 0."""

    def loss(model, batch, key):
        sums = clm.loss(model, batch, key)
        return Sums(sums.loss * jnp.where(batch["tokens"][0, 0] == 0, value, 1.0), *sums[1:])

    return loss


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e6])
def test_a_bad_step_changes_nothing_and_is_counted(blueprint, batch, value):
    good = dict(batch, tokens=batch["tokens"].at[0, 0].set(1))
    bad = dict(batch, tokens=batch["tokens"].at[0, 0].set(0))
    guard = step.Guard(factor=10.0, after=2)
    tx = optax.adam(1e-2)
    states, metrics = run(blueprint, [good, good, bad, bad, good], tx, poisoned(value), guard=guard, ema=0.5)
    for part in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, states[4][part], states[2][part])
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), states[5][part], states[4][part])))
    assert [int(m["skipped"]) for m in metrics] == [0, 0, 1, 2, 2]
    assert [int(m["in_row"]) for m in metrics] == [0, 0, 1, 2, 0]
    assert int(states[-1]["progress"]["step"]) == 5


def test_gradients_that_have_risen_to_stay_are_followed_after_a_few_steps(blueprint, batch):
    """As where a plateau ends: a mean of good steps alone would call each of the others a spike, and end the run."""
    good = dict(batch, tokens=batch["tokens"].at[0, 0].set(1))
    risen = dict(batch, tokens=batch["tokens"].at[0, 0].set(0))
    guard = step.Guard(factor=10.0, after=2)
    _, metrics = run(blueprint, [good] * 3 + [risen] * 15, optax.sgd(0.0), poisoned(50.0), guard=guard)
    skipped = [int(m["in_row"]) for m in metrics]
    assert skipped == [0, 0, 0, *range(1, 11), *[0] * 5], "1.18 ** 10 > 5"


def test_gradients_of_nothing_at_first_make_no_spikes_of_all_that_come(blueprint, batch):
    good = dict(batch, tokens=batch["tokens"].at[0, 0].set(1))
    nothing = dict(batch, tokens=batch["tokens"].at[0, 0].set(0))
    guard = step.Guard(factor=10.0, after=8)
    _, metrics = run(blueprint, [nothing] + [good] * 12, optax.sgd(0.0), poisoned(0.0), guard=guard)
    assert [int(m["skipped"]) for m in metrics] == [0] * 13 and metrics[0]["grad_norm"] == 0


def test_a_batch_without_a_real_token_is_skipped(blueprint, batch):
    empty = dict(batch, weights=jnp.zeros_like(batch["weights"]))
    states, metrics = run(blueprint, [empty])
    jax.tree.map(np.testing.assert_array_equal, states[0]["params"], states[1]["params"])
    assert int(metrics[0]["skipped"]) == 1 and metrics[0]["loss"] == 0


def test_the_moving_average_follows_its_definition(blueprint, batch):
    states, _ = run(blueprint, [batch] * 3, ema=0.9)
    want = states[0]["params"]
    for state in states[1:]:
        want = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, want, state["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[-1]["ema"], want)


def test_dropout_differs_from_step_to_step_and_part_to_part(batch):
    """Seeds come from (seed, step, part): the same twice, and never the same mask again."""
    model = Blueprint.of(MODEL | {"dropout": 0.5}, vocab=V)
    same = {name: jnp.stack([x[0]] * B) for name, x in batch.items()}
    still = optax.sgd(0.0)
    _, metrics = run(model, [same, same], still)
    _, again = run(model, [same, same], still)
    assert metrics[0]["loss"] == again[0]["loss"] != metrics[1]["loss"] == again[1]["loss"]


@pytest.mark.parametrize("name, kind", [("bert", "encoder"), ("t5", "encoder-decoder")])
def test_a_model_that_sees_what_it_has_to_predict_is_a_mistake(name, kind):
    """Its loss would fall to zero, and mean nothing."""
    model = dict(name=name, layers=1, width=8, heads=2, mlp_width=16)
    how = dict(optimizer=dict(name="sgd", lr=0.1), steps=1, length=T, mesh=axes.mesh(), rules=axes.RULES)
    with pytest.raises(Mistake, match=f"'clm' trains models of the kind decoder, and this one is of the kind {kind}"):
        step.assemble(model=model, words=Words.of_size(V), **how)


def test_the_state_is_placed_as_its_parameters_are(blueprint):
    mesh = axes.mesh(data=2, fsdp=2, tensor=2)
    shapes = step.shapes(blueprint, optax.adamw(1e-3), mesh, axes.RULES, ema=0.9)
    wq = shapes["params"]["blocks"]["attn"]["wq_DNH"].sharding
    assert wq.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    mu = [
        x.sharding
        for path, x in jax.tree_util.tree_leaves_with_path(shapes["opt"])
        if "mu" in jax.tree_util.keystr(path) and "wq_DNH" in jax.tree_util.keystr(path)
    ]
    assert mu == [wq] and shapes["ema"]["blocks"]["attn"]["wq_DNH"].sharding == wq
