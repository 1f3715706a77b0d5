"""Every attention backend gives the numbers of a plain numpy softmax, forward and backward, or says why it will not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.lookup import Mistake
from jaxlm.nn.attention import BACKENDS, Mask, attend, choose, chunked

B, N, K, T, H = 2, 4, 2, 130, 8
SEGMENTS = jnp.asarray([[1] * 50 + [2] * 60 + [3] * 20, [1] * 100 + [0] * 30])
MASKS = {
    "causal": Mask(),
    "segments": Mask(segments_BT=SEGMENTS),
    "window": Mask(window=7),
    "window and segments": Mask(window=7, segments_BT=SEGMENTS),
}


def inputs(length=T, keys=None):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    return draw(0, B, N, length, H), draw(1, B, K, keys or length, H), draw(2, B, K, keys or length, H)


def by_hand(q, k, v, mask):
    """One query at a time, in numpy, from the words of the mask's docstring."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments = None if mask.segments_BT is None else np.asarray(mask.segments_BT)
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        slot = t + (0 if mask.offset_B is None else int(mask.offset_B[b]))
        see = [
            s for s in range(k.shape[2])
            if (not mask.causal or s <= slot)
            and (mask.window is None or abs(slot - s) < mask.window)
            and (segments is None or segments[b, t] == segments[b, s])
        ]  # fmt: skip
        score = q[b, n, t] @ k[b, n // (N // K), see].T / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, n, t] = weight / weight.sum() @ v[b, n // (N // K), see]
    return out


@pytest.fixture(scope="module", params=MASKS.values(), ids=MASKS.keys())
def mask(request):
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_agrees_with_numpy(backend, mask):
    np.testing.assert_allclose(attend(*inputs(), mask, backend), by_hand(*inputs(), mask), atol=2e-6)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"xla"}))
def test_gradients_agree_with_the_reference(backend, mask):
    def gradients(backend):
        weight = jax.random.normal(jax.random.key(9), (B, N, T, H))
        return jax.jit(jax.grad(lambda *qkv: (attend(*qkv, mask, backend) * weight).sum(), argnums=(0, 1, 2)))(
            *inputs()
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients(backend), gradients("xla"))


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_queries_continue_a_cache_each_row_at_its_own_slot(backend):
    q, k, v = inputs(5, keys=40)
    mask = Mask(offset_B=jnp.asarray([30, 7]))
    np.testing.assert_allclose(attend(q, k, v, mask, backend), by_hand(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_without_causality_all_see_all_of_their_segment(backend):
    mask = Mask(causal=False, segments_BT=SEGMENTS)
    np.testing.assert_allclose(attend(*inputs(), mask, backend), by_hand(*inputs(), mask), atol=2e-6)


def test_chunks_that_do_not_divide_the_length_change_nothing():
    whole = chunked(*inputs(), Mask(), chunk=T)
    for chunk in (1, 48, 129):
        np.testing.assert_allclose(chunked(*inputs(), Mask(), chunk=chunk), whole, atol=1e-6)


def test_chunked_memory_does_not_grow_with_the_square_of_the_length():
    def temporary(length, backend):
        shapes = [jax.ShapeDtypeStruct((1, n, length, H), jnp.float32) for n in (N, K, K)]
        gradient = jax.jit(jax.grad(lambda *qkv: attend(*qkv, Mask(), backend).sum(), argnums=(0, 1, 2)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096, "chunked") < 5 * temporary(1024, "chunked")
    assert temporary(4096, "chunked") < temporary(4096, "xla") / 4


def test_bfloat16_softmax_runs_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    exact = by_hand(q, k, v, Mask())
    for backend in BACKENDS:
        got = attend(q, k, v, Mask(), backend)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)


def test_splash_says_why_it_refuses():
    q, k, v = inputs(5, keys=40)
    with pytest.raises(Mistake, match="no cache"):
        attend(q, k, v, Mask(offset_B=jnp.zeros(B, jnp.int32)), "splash")


def test_an_unknown_backend_is_answered_with_the_nearest():
    with pytest.raises(Mistake, match="did you mean 'splash'"):
        attend(*inputs(), Mask(), "splahs")


def test_auto_never_builds_a_square_of_scores_for_long_rows():
    assert choose((1, 8, 512, 64), (1, 8, 512, 64), Mask()) == "xla"
    assert choose((1, 8, 8192, 64), (1, 8, 8192, 64), Mask()) == "chunked"
