"""The chunked loss is the plain loss: value, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes, hlo
from jaxlm.nn.linear import Head
from jaxlm.nn.loss import cross_entropy

B, T, D, V = 3, 10, 8, 33


@pytest.fixture(scope="module")
def inputs():
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    head = jax.random.normal(jax.random.key(1), (V, D))
    labels = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    weights = jnp.asarray(np.random.default_rng(0).choice([0.0, 1.0, 0.5], (B, T)), jnp.float32)
    return x, head, labels, weights


def plain(x, head, labels, weights, label_smoothing=0.0, z_loss=0.0, bias=None, cap=None):
    """From the definition: cross-entropy with a smoothed target distribution, and the z-loss."""
    logits = jnp.einsum("btd,vd->btv", x, head)
    logits = logits if bias is None else logits + bias[None, None]
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    target = (1 - label_smoothing) * jax.nn.one_hot(labels, V) + label_smoothing / V
    loss = -(target * jax.nn.log_softmax(logits)).sum(-1) + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    return (loss * weights).sum()


@pytest.mark.parametrize("chunk", [None, 1, 3, 10])
@pytest.mark.parametrize(
    "options", [{}, dict(label_smoothing=0.1), dict(z_loss=1e-2), dict(label_smoothing=0.2, z_loss=0.1)], ids=str
)
def test_loss_and_gradients_equal_the_plain_ones(inputs, chunk, options):
    x, head, labels, weights = inputs
    got = jax.value_and_grad(
        lambda x, h: 3 * cross_entropy(x, Head(h), labels, weights, chunk=chunk, **options).loss, argnums=(0, 1)
    )
    want = jax.value_and_grad(lambda x, h: 3 * plain(x, h, labels, weights, **options), argnums=(0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got(x, head), want(x, head))


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_bias_and_a_cap_are_in_value_and_gradients(inputs, chunk, cap):
    x, table, labels, weights = inputs
    bias, more = jax.random.normal(jax.random.key(3), (V,)), dict(label_smoothing=0.1, z_loss=1e-2)
    got = jax.value_and_grad(
        lambda x, t, b: cross_entropy(x, Head(t, b, cap), labels, weights, chunk=chunk, **more).loss, argnums=(0, 1, 2)
    )
    want = jax.value_and_grad(lambda x, t, b: plain(x, t, labels, weights, bias=b, cap=cap, **more), argnums=(0, 1, 2))
    both = got(x, table, bias), want(x, table, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *both)


def test_reports_leave_out_smoothing_and_padding(inputs):
    x, head, labels, weights = inputs
    sums = cross_entropy(x, Head(head), labels, weights, label_smoothing=0.3, z_loss=0.1, chunk=4)
    logits = jnp.einsum("btd,vd->btv", x, head)
    assert sums.nll == pytest.approx(float(plain(x, head, labels, weights)), rel=1e-5)
    assert sums.correct == pytest.approx(float(((logits.argmax(-1) == labels) * weights).sum()))
    assert sums.weight == weights.sum()


def test_padding_and_its_labels_change_nothing(inputs):
    x, head, labels, weights = inputs
    hidden = weights == 0
    other = cross_entropy(jnp.where(hidden[..., None], 7.0, x), Head(head), jnp.where(hidden, 0, labels), weights)
    assert other.loss == pytest.approx(float(cross_entropy(x, Head(head), labels, weights).loss), rel=1e-6)


def test_the_full_logits_never_exist():
    B, T, D, V = 4, 1024, 32, 8192
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "float32"))
    ]

    def temporary(chunk):
        step = jax.jit(jax.grad(lambda x, h, *a: cross_entropy(x, Head(h), *a, chunk=chunk).loss, argnums=(0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) < B * T * V * 4 / 8 < B * T * V * 4 < temporary(T)


ALL = dict(D=("fsdp", "data"))  # as where weights are split over slices, too
MESHES = [(dict(data=2, fsdp=4), {}), (dict(data=2, fsdp=2, tensor=2), {}), (dict(data=2, fsdp=4), ALL)]


@pytest.mark.parametrize("mesh, rules", MESHES, ids=str)
def test_eight_devices_go_through_their_own_tokens_and_sum_the_heads_gradient_once(mesh, rules):
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (8, 12, 24))
    head, bias = jax.random.normal(keys[1], (32, 24)), jax.random.normal(keys[2], (32,))
    labels, weights = jax.random.randint(keys[3], (8, 12), 0, 32), (jnp.arange(96) % 5 > 0).reshape(8, 12)

    def loss(x, head, bias):
        return cross_entropy(x, Head(head, bias), labels, weights, chunk=3).loss

    wanted = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, head, bias)
    rules = {**axes.RULES, **rules}
    with axes.on(axes.mesh(**mesh), rules) as place:
        spread = axes.shardings(dict(x_BTD=x, head_VD=head, bias_V=bias), place, rules)
        args = [jax.device_put(a, spread[n]) for n, a in dict(x_BTD=x, head_VD=head, bias_V=bias).items()]
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        got, text = program(*args), program.lower(*args).compile().as_text() or ""
        np.testing.assert_allclose(jax.jit(loss)(*args), wanted[0], rtol=1e-5)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    sent = [op for op in hlo.read(text) if op.kind in hlo.COLLECTIVES]
    tables = [op for op in sent if any(len(shape) > 1 and {32, 16} & set(shape) for _, shape in op.sizes)]
    assert tables and all(op.times == 1 for op in tables), [(op.kind, op.times, op.sizes) for op in tables]
