"""Every attention backend gives the numbers of a plain numpy softmax, forward and backward, or says why it will not."""

import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.lookup import Mistake
from jaxlm.nn import triton
from jaxlm.nn.attention import BACKENDS, KERNELS, Attention, Mask, attend, choose, chunked

B, N, K, T, H = 2, 4, 2, 130, 8
SEGMENTS = jnp.asarray([[1] * 50 + [2] * 60 + [3] * 20, [1] * 100 + [0] * 30])
MASKS = {
    "causal": Mask(),
    "segments": Mask(segments_BT=SEGMENTS),
    "window": Mask(window=7),
    "window and segments": Mask(window=7, segments_BT=SEGMENTS),
    "both sides": Mask(causal=False),
    "both sides and segments": Mask(causal=False, segments_BT=SEGMENTS),
    "both sides, window and segments": Mask(causal=False, window=7, segments_BT=SEGMENTS),
}
PAIRS = [(b, m) for b in BACKENDS for m in MASKS if not (b == "triton" and MASKS[m].window)]  # it has no window

pytestmark = pytest.mark.xdist_group("attention")  # in one process, which asks for each answer once


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


@functools.cache
def answer(mask):
    return by_hand(*inputs(), MASKS[mask])


@pytest.mark.parametrize("backend, mask", PAIRS)
def test_a_backend_agrees_with_numpy(backend, mask):
    got = jax.jit(lambda *qkv: attend(*qkv, MASKS[mask], backend))(*inputs())
    np.testing.assert_allclose(got, answer(mask), atol=2e-6)


def gradients(backend, mask, weight):
    """Of the weighted sum of what comes out, by queries, keys and values."""
    return jax.jit(jax.grad(lambda *qkv: (attend(*qkv, mask, backend) * weight).sum(), argnums=(0, 1, 2)))(*inputs())


@functools.cache
def some_gradients(backend, mask):
    return gradients(backend, MASKS[mask], jax.random.normal(jax.random.key(9), (B, N, T, H)))


@pytest.mark.parametrize("backend, mask", [(b, m) for b, m in PAIRS if b != "xla"])
def test_gradients_agree_with_the_reference(backend, mask):
    got, want = (some_gradients(b, mask) for b in (backend, "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_neighbour_changes_nothing(backend, causal):
    """Neither what a segment's queries answer, nor, by their answers, anything of a neighbour's."""
    mask, second = Mask(causal=causal, segments_BT=SEGMENTS), np.asarray(SEGMENTS) == 2
    run = jax.jit(lambda *qkv: attend(*qkv, mask, backend))
    other = [jnp.where(second[:, None, :, None], x, 7.0 - x) for x in inputs()]
    before, after = (np.asarray(run(*x)).transpose(0, 2, 1, 3)[second] for x in (inputs(), other))
    np.testing.assert_array_equal(before, after)
    for x in gradients(backend, mask, second[:, None, :, None]):
        by_token = np.abs(x).max(axis=(1, 3))
        assert (by_token[~second] == 0).all() and (by_token[second] > 0).any()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_computes_on_eight_devices_what_it_does_on_one(backend):
    want = some_gradients(backend, "segments")
    with axes.on(axes.mesh(data=2, fsdp=2, tensor=2)):
        got = some_gradients.__wrapped__(backend, "segments")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_queries_continue_a_cache_each_row_at_its_own_slot(backend):
    q, k, v = inputs(5, keys=40)
    mask = Mask(offset_B=jnp.asarray([30, 7]))
    np.testing.assert_allclose(attend(q, k, v, mask, backend), by_hand(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_read_the_same_tokens_share_their_keys(packed):
    layer = Attention(16, N, K, H, bias=True, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    x_BTD, others_BSD = (jax.random.normal(jax.random.key(i), (rows, 5, 16)) for i, rows in enumerate((6, 2)))
    k, v = layer.keys_values(others_BSD)
    segments_BT = jnp.asarray([[1, 1, 2, 2, 2]] * 6) if packed else None
    keys_BS = jnp.asarray([[1, 2, 2, 0, 0], [1, 1, 2, 2, 0]])
    mask = lambda keys_BS: Mask(causal=False, segments_BT=segments_BT, keys_BS=keys_BS)  # noqa: E731
    each = jnp.repeat(jnp.arange(2), 3)
    over = jax.jit(lambda k, v, keys_BS: layer.over(x_BTD, k, v, mask(keys_BS)))
    np.testing.assert_allclose(over(k, v, keys_BS), over(k[each], v[each], keys_BS[each]), atol=1e-6)


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
        got = jax.jit(lambda *qkv, backend=backend: attend(*qkv, Mask(), backend))(q, k, v)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)


CACHED = Mask(offset_B=jnp.zeros(B, jnp.int32))
REFUSALS = {
    "a cache": ("splash", (5, 40), CACHED, {}, "no cache"),
    "other tokens in order": ("splash", (5, 40), Mask(), {}, "where order matters"),
    "a bias": ("splash", (5, 5), Mask(), dict(bias=lambda ahead: ahead[:, None] * 1.0), "adds no bias"),
    "a cache on a GPU": ("triton", (40, 40), CACHED, {}, "no cache"),
    "a bias on a GPU": ("triton", (5, 5), Mask(), dict(bias=lambda ahead: ahead[:, None] * 1.0), "adds no bias"),
    "other tokens": ("triton", (5, 40), Mask(causal=False), {}, "tokens that the keys are"),
    "a memory": ("triton", (5, 5), Mask(causal=False, keys_BS=jnp.ones((B, 5))), {}, "tokens that the keys are"),
    "a cap": ("triton", (5, 5), Mask(), dict(cap=30.0), "does not cap"),
    "a window": ("triton", (5, 5), Mask(window=4), {}, "no sliding window"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_kernel_says_why_it_refuses(case):
    backend, (queries, keys), mask, more, why = REFUSALS[case]
    with pytest.raises(Mistake, match=f"'{backend}': .*{why}.*; choose 'xla' or 'chunked'"):
        attend(*inputs(queries, keys), mask, backend, **more)


def test_an_unknown_backend_is_answered_with_the_nearest():
    with pytest.raises(Mistake, match="did you mean 'splash'"):
        attend(*inputs(), Mask(), "splahs")


def test_auto_never_builds_a_square_of_scores_for_long_rows():
    assert choose((1, 8, 512, 64), (1, 8, 512, 64), Mask()) == "xla"
    assert choose((1, 8, 8192, 64), (1, 8, 8192, 64), Mask()) == "chunked"


# The GPU's kernel, for a GPU that is not here.


@pytest.fixture
def gpu(monkeypatch):
    """Code is lowered as for a GPU; its compute capability can be set."""
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(axes, "device", lambda: device)
    return device


@pytest.mark.parametrize("head_width", [H, 64, 80, 128])
def test_for_a_gpu_attention_is_triton_kernels_forward_and_backward(gpu, head_width):
    q, k = (jax.ShapeDtypeStruct((B, n, T, head_width), jnp.bfloat16) for n in (N, K))
    gradient = jax.grad(lambda *qkv: attend(*qkv, MASKS["segments"]).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h100)):
        text = jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    for name in ("mha_forward", "mha_preprocess_backward", "mha_backward"):
        assert f'name = "{name}"' in text


def test_auto_takes_the_gpus_kernel_where_it_applies_and_no_other(gpu, monkeypatch):
    shape = (1, 8, 2048, 64)
    assert choose(shape, shape, Mask(segments_BT=jnp.ones((1, 2048)))) == "triton"
    assert choose(shape, shape, Mask(window=4096)) == "triton", "a window wider than the row hides nothing"
    assert choose(shape, shape, Mask(window=128)) == "chunked"
    assert choose(shape, shape, Mask(), cap=30.0) == choose(shape, shape, Mask(), biased=True) == "chunked"
    assert choose((1, 8, 1, 64), shape, Mask(offset_B=jnp.zeros(1))) == "xla"
    assert choose((1, 8, 2048, 256), (1, 8, 2048, 256), Mask()) == "chunked"
    gpu.compute_capability = "7.5"
    assert choose(shape, shape, Mask()) == "chunked"
    gpu.compute_capability = "10.0"
    assert choose(shape, shape, Mask()) == "triton"
    monkeypatch.setattr(triton, "SOURCE", "jax.gone")
    assert choose(shape, shape, Mask()) == "chunked"
