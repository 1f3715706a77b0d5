"""Products and biases in bfloat16: rounded once, whatever way is fast where they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.nn.linear import Turned, crossed, dense, embed
from jaxlm.nn.mlp import GELU_TANH, bent


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_in_bfloat16_is_that_of_the_rounded_numbers(rows):
    """However it is computed: the weight as it is or turned, for one row or several, forward and back."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, rows, 64), (64, 32)]))
    half = x.astype(jnp.bfloat16)
    exact = np.asarray(half, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    turned = Turned(w.T, (32,))
    for weight in (w, turned):
        found = dense(half, weight)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)
    d_x, d_w = jax.grad(lambda x, w: dense(x, w).astype(jnp.float32).sum(), argnums=(0, 1))(half, w)
    assert (d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(
        d_x[0, 0].astype(float), w.astype(jnp.bfloat16).astype(float).sum(1), rtol=0.02, atol=0.02
    )
    np.testing.assert_allclose(d_w[:, 0], half.astype(jnp.float32)[0].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [GELU_TANH, jax.nn.silu])
def test_an_activation_in_bfloat16_is_rounded_once(activation):
    """And its gradient: nearer than a step of it apart, as it would be were each step rounded."""
    x, gated = (jax.random.normal(jax.random.key(i), (4096,)).astype(jnp.bfloat16) for i in (0, 1))
    full = [a.astype(jnp.float32) for a in (x, gated)]
    nearest = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float32)  # noqa: E731
    run = lambda fn, *a: (fn(*a), *jax.vjp(fn, *a)[1](jnp.ones_like(a[0])))  # noqa: E731
    found = run(lambda x, gated: bent(activation, x, gated), x, gated)
    for ours, exact in zip(found, run(lambda x, gated: activation(x) * gated, *full)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours, np.float32), nearest(exact))


@pytest.mark.parametrize("turned", [False, True])
def test_a_bias_is_added_before_the_product_is_rounded(turned):
    x, w = jnp.ones((1, 2, 1), jnp.bfloat16), jnp.ones((1, 3))
    add = lambda bias: dense(x, Turned(w.T, (3,)) if turned else w, jnp.full(3, bias)).tolist()  # noqa: E731
    assert add(2**-8) == [[[1.0] * 3] * 2], "half of the last place is rounded to even"
    assert add(2**-8 + 2**-16) == [[[1 + 2**-7] * 3] * 2], "and a bit more upwards, which a rounded bias would not tell"


def test_the_gradient_of_a_bias_is_summed_in_float32():
    x, w, bias = jnp.zeros((1, 1000, 8), jnp.bfloat16), jnp.zeros((8, 4)), jnp.zeros(4)
    found = jax.grad(lambda b: dense(x, w, b).astype(jnp.float32).sum())(bias)
    assert found.dtype == jnp.float32 and found.tolist() == [1000.0] * 4, "in bfloat16 it would stop at 256"


def test_a_sum_over_tokens_in_bfloat16_rounds_nothing_on_its_way():
    """Turned in memory as on one device, several at a time or not."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((2, 512, n)), jnp.bfloat16) for n in (6, 10))
    want = np.einsum("btm,btn->bmn", np.asarray(a, np.float64), np.asarray(b, np.float64))
    for found in (crossed(a, b), jax.jit(crossed)(a, b), jnp.stack([crossed(a[i], b[i]) for i in range(2)])):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


def test_devices_that_have_tokens_of_their_own_gather_none_of_them_for_a_sum_over_tokens():
    mesh = axes.mesh(data=8)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    a, b = (jax.ShapeDtypeStruct((64, n), jnp.bfloat16, sharding=place) for n in (16, 8))
    with axes.on(mesh):
        text = jax.jit(crossed).lower(a, b).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_a_token_that_comes_often_gets_all_of_its_gradient_where_the_stream_is_bfloat16(monkeypatch):
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    tokens_BT = jnp.zeros((2, 1024), jnp.int32)
    rows = lambda table_VD: embed(table_VD, tokens_BT, "bfloat16")  # noqa: E731
    assert rows(jnp.ones((3, 4))).dtype == jnp.bfloat16
    gradient_VD = jax.grad(lambda table_VD: rows(table_VD).astype(jnp.float32).sum())(jnp.ones((3, 4)))
    np.testing.assert_array_equal(gradient_VD, [[2048.0] * 4, [0.0] * 4, [0.0] * 4])  # in bfloat16 256 + 1 is 256
