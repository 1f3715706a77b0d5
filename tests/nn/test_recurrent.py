"""Every recurrent cell gives the numbers of a plain loop over tokens, forward and backward, and begins anew with each
segment.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.lookup import Mistake
from jaxlm.nn.cache import Cache
from jaxlm.nn.recurrent import CELLS, Recurrent

B, T, D = 2, 9, 6
SEGMENTS = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])


def layer(cell):
    made = Recurrent(cell, D, std=0.5, rngs=nnx.Rngs(0))
    made.bias_GF[...] += jax.random.normal(jax.random.key(2), made.bias_GF.shape)
    return made


def inputs():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(cell, x_BTD, segments_BT=None):
    """One row and one token at a time, in numpy, from the papers' equations: outputs and memories."""
    w, u, b = (np.asarray(p[...], np.float64) for p in (cell.input_DGF, cell.recur_DGF, cell.bias_GF))
    hs, cs = np.zeros((B, T, D)), np.zeros((B, T, D))
    for row in range(B):
        h = c = np.zeros(D)
        for t, x in enumerate(np.asarray(x_BTD[row], np.float64)):
            if segments_BT is not None and t and segments_BT[row, t] != segments_BT[row, t - 1]:
                h = c = np.zeros(D)
            wx, uh = np.einsum("d,dgf->gf", x, w) + b, np.einsum("d,dgf->gf", h, u)
            if cell.cell == "rnn":
                h = np.tanh(wx[0] + uh[0])
            elif cell.cell == "gru":
                r, z = sigmoid(wx[0] + uh[0]), sigmoid(wx[1] + uh[1])
                h = z * h + (1 - z) * np.tanh(wx[2] + r * uh[2])
            else:
                i, f, o, g = *map(sigmoid, wx[:3] + uh[:3]), np.tanh(wx[3] + uh[3])
                c = f * c + i * g
                h = o * np.tanh(c)
            hs[row, t], cs[row, t] = h, c
    return hs, cs


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_the_loop_of_its_equations(cell, segments):
    recurrent, x_BTD = layer(cell), inputs()
    graph, params = nnx.split(recurrent)
    got = jax.jit(lambda p, x: nnx.merge(graph, p)(x, segments)[0])(params, x_BTD)
    np.testing.assert_allclose(got, by_hand(recurrent, x_BTD, segments)[0], atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_is_that_of_the_loop(cell):
    """By central differences of the numpy loop, in float64, along a few directions in all parameters and inputs."""
    recurrent, x_BTD = layer(cell), inputs()
    graph, params = nnx.split(recurrent)
    pull = jax.random.normal(jax.random.key(3), (B, T, D))
    both = (nnx.to_pure_dict(params), x_BTD)
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p[0])(p[1], SEGMENTS)[0] * pull).sum()))(both)

    def at(direction, step):
        moved, x = jax.tree.map(lambda a, d: np.asarray(a, np.float64) + step * np.asarray(d), both, direction)

        class Moved:
            pass

        Moved.cell, (Moved.bias_GF, Moved.input_DGF, Moved.recur_DGF) = cell, (moved[k] for k in sorted(moved))
        return (by_hand(Moved, x, SEGMENTS)[0] * np.asarray(pull)).sum()

    for seed in range(3):
        draw = lambda x, seed=seed: jax.random.normal(jax.random.key(10 * seed + x.size), x.shape)  # noqa: E731
        direction = jax.tree.map(draw, both)
        got = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        assert got == pytest.approx((at(direction, 1e-4) - at(direction, -1e-4)) / 2e-4, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cache_holds_the_state_after_every_token(cell, unstacked):
    """So that a row may be set back to any token and go on from there."""
    recurrent, x_BTD = layer(cell), inputs()
    hs, cs = by_hand(recurrent, x_BTD)
    memory = CELLS[cell].memory
    cache = Cache.empty(1, B, 1, 12, D, jnp.float32, values=memory)
    cache = cache.unstacked() if unstacked else cache
    _, cache = recurrent(x_BTD[:, :6], cache=cache, layer=0)
    k_BKSH, v_BKSH = cache.read(0)
    np.testing.assert_allclose(k_BKSH[:, 0, :6], hs[:, :6], atol=1e-5)
    assert (v_BKSH is not None) == memory, "what a cell does not have takes no room"
    if memory:
        np.testing.assert_allclose(v_BKSH[:, 0, :6], cs[:, :6], atol=1e-5)
    back = dataclasses.replace(cache, lengths_B=jnp.asarray([6, 0]))  # the second row begins anew
    y_BTD, _ = recurrent(jnp.stack([x_BTD[0, 6:8], x_BTD[1, :2]]), cache=back, layer=0)
    np.testing.assert_allclose(y_BTD, [hs[0, 6:8], hs[1, :2]], atol=1e-5)
    picked = cache.rows(jnp.asarray([1, 1]))
    np.testing.assert_array_equal(picked.read(0)[0][0], k_BKSH[1])


def test_an_lstm_remembers_in_float32():
    """A memory that counts up by less than a bfloat16's last bit still counts."""
    recurrent = layer("lstm")
    recurrent.input_DGF[...] *= 0
    recurrent.recur_DGF[...] *= 0
    recurrent.bias_GF[...] = jnp.full((4, D), 20.0)  # every gate open: each token adds 1
    cache = Cache.empty(1, 1, 1, 400, D, jnp.float32)
    _, cache = recurrent(jnp.zeros((1, 400, D), jnp.bfloat16), cache=cache, layer=0)
    np.testing.assert_allclose(cache.v_LBKSH[0, 0, 0, -1], 400.0, rtol=1e-4)


def test_a_cell_that_is_none_is_a_mistake():
    with pytest.raises(Mistake, match=r"config\.model\.cell has no 'ltsm'; did you mean 'lstm'"):
        layer("ltsm")
