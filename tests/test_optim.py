"""Optimisers: schedules as published, decay only where it belongs, every name of Optax under one roof."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import axes, optim
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint

SHAPES = Blueprint.of(dict(name="gpt2", layers=2, width=8, heads=2, context=8), vocab=16).shapes
PARAMS = jax.tree.map(lambda x: jnp.ones(x.shape), SHAPES)


def one_step(gradient=0.0, **section):
    """What one step adds to parameters that are all 1."""
    tx, _ = optim.optimizer(SHAPES, steps=10, **section)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, gradient), PARAMS)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd", "adam"])
def test_decay_is_decoupled_and_spares_vectors_norms_and_biases(name):
    updates = one_step(0.0, name=name, lr=0.1, schedule="constant", weight_decay=0.5)
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
        want = -0.05 if axes.is_matrix(path) else 0.0
        np.testing.assert_allclose(x, want, atol=1e-7, err_msg=jax.tree_util.keystr(path))
    assert axes.is_matrix((jax.tree_util.DictKey("embed_VD"),)) and not axes.is_matrix(
        (jax.tree_util.DictKey("bias_q_NH"),)
    )


def test_adamw_is_optax_adamw():
    mask = jax.tree_util.tree_map_with_path(lambda path, _: axes.is_matrix(path), PARAMS)
    reference = optax.adamw(0.01, b1=0.8, weight_decay=0.3, mask=mask)
    grads = jax.tree.map(lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape), PARAMS)
    tx, _ = optim.optimizer(SHAPES, steps=10, name="adamw", lr=0.01, schedule="constant", b1=0.8, weight_decay=0.3)
    got, want = (t.update(grads, t.init(PARAMS), PARAMS)[0] for t in (tx, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), got, want)


def test_muon_turns_each_layers_matrices_and_leaves_embeddings_to_adam():
    dimensions = optim.muon_dimensions(PARAMS)
    assert (
        dimensions["embed_VD"] is None and dimensions["positions_TD"] is None and dimensions["norm"]["scale_D"] is None
    )
    attn = dimensions["blocks"]["attn"]
    assert attn["wq_DNH"] == optax.contrib.MuonDimensionNumbers((1,), (2, 3)), "the layer axis is none of the matrix's"
    assert attn["wo_NHD"] == optax.contrib.MuonDimensionNumbers((1, 2), (3,))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)
    tx, _ = optim.optimizer(SHAPES, steps=10, name="muon", lr=1.0, schedule="constant")
    update = tx.update(grads, tx.init(PARAMS), PARAMS)[0]["blocks"]["mlp"]["up_DF"]
    spectrum = np.linalg.svd(np.asarray(update), compute_uv=False)
    assert spectrum.max() / spectrum.min() < 3, "a step is near orthogonal, layer by layer"


def test_muon_leaves_a_table_of_biases_by_distance_to_adam():
    """Turned, it would move by a fifth of the learning rate a step, and T5 would learn no distances."""
    assert optim.muon_dimensions({"bias": {"table_CN": jnp.ones((32, 6))}})["bias"]["table_CN"] is None


def test_muon_turns_each_experts_matrices():
    dimensions = optim.muon_dimensions({"moe": {"up_EDF": jnp.ones((2, 5, 8, 12)), "down_EFD": jnp.ones((5, 12, 8))}})
    assert dimensions["moe"]["up_EDF"] == optax.contrib.MuonDimensionNumbers((2,), (3,)), "neither layer nor expert"
    assert dimensions["moe"]["down_EFD"] == optax.contrib.MuonDimensionNumbers((1,), (2,))


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    updates = one_step(5.0, name="sgd", lr=1.0, schedule="constant", clip=0.25)
    assert optax.tree.norm(updates) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", {0: 0.1, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("cosine", {4: 0.5, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("wsd", {4: 0.5, 10: 1.0, 82: 1.0, 91: 0.6, 100: 0.2}),
        ("rsqrt", {4: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
    ],
)
def test_a_schedule_goes_where_it_was_published_to_go(name, want):
    rate = optim.learning_rate(name, 1.0, steps=100, warmup=10, final=0.2, decay=0.2)
    for step, value in want.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def test_an_optimizers_own_decay_is_its_own():
    """Of a squared gradient of 1 the first step keeps 1 - decay, and so is lr / sqrt(1 - decay)."""
    for decay in (0.9, 0.99):
        section = dict(name="rmsprop", lr=1.0, schedule="constant", decay=decay)
        for update in jax.tree.leaves(one_step(1.0, **section)):
            np.testing.assert_allclose(update, -((1 - decay) ** -0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="adammw"), "did you mean 'adamw'"),
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(b3=0.9), "config.optimizer has no 'b3'"),
        (dict(learning_rate=0.9), "config.optimizer has no 'learning_rate'"),
        (dict(warmup=11), "warmup=11 is not between 0 and config.steps=10"),
        (dict(lr=-0.1), "config.optimizer.lr=-0.1 is not 0 or more"),
        (dict(lr=float("nan")), "config.optimizer.lr=nan"),
        (dict(clip=-1.0), "config.optimizer.clip=-1.0"),
        (dict(weight_decay=-0.1), "config.optimizer.weight_decay=-0.1"),
        (dict(final=1.5), "config.optimizer.final=1.5 is not between 0 and 1"),
        (dict(schedule="wsd", decay=0.0), "config.optimizer.decay=0.0"),
        (dict(mu_dtype="float99"), "config.optimizer.mu_dtype has no 'float99'; did you mean 'float32'"),
        (dict(b1=5), "config.optimizer.b1=5 is not between 0 and 1"),
        (dict(b1="much"), "config.optimizer: Optax's adamw with .*much"),
        (dict(name="muon", beta=-1.0), "config.optimizer.beta=-1.0 is not between 0 and 1"),
        (dict(name="muon", ns_steps=0), "config.optimizer.ns_steps=0 is not 1 or more"),
        (dict(name="muon", nesterov=7), "config.optimizer.nesterov is True or False, not 7"),
        (dict(eps=-1e-8), "config.optimizer.eps=-1e-08 is not 0 or more"),
        (dict(name="rmsprop", schedule="wsd", decay=0.9), "decay=0.9: both wsd and rmsprop have one"),
    ],
    ids=str,
)
def test_a_mistake_is_named_with_its_choices(section, message):
    with pytest.raises(Mistake, match=message):
        one_step(**section)
