"""Attention over tokens that lie on several devices gives what one device gives, and sends around what it says."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.lookup import Mistake
from jaxlm.nn import context
from jaxlm.nn.attention import Mask, attend
from jaxlm.nn.positions import RelativeBias

B, N, K, T, H = 2, 4, 2, 32, 8
SEGMENTS = jnp.asarray([[1] * 13 + [2] * 15 + [3] * 4, [1] * 25 + [0] * 7])
PREFIX = jnp.asarray([[1] * 9 + [0] * 23, [1] * 25 + [0] * 7])
MASKS = {
    "causal": Mask(),
    "segments": Mask(segments_BT=SEGMENTS),
    "window": Mask(window=7),
    "wide window and segments": Mask(window=19, segments_BT=SEGMENTS),
    "prefix": Mask(prefix_BT=PREFIX),
    "prefix, window and segments": Mask(prefix_BT=PREFIX, window=7, segments_BT=SEGMENTS),
    "both sides": Mask(causal=False),
    "both sides, window and segments": Mask(causal=False, window=7, segments_BT=SEGMENTS),
    "others": Mask(causal=False, segments_BT=SEGMENTS, keys_BS=jnp.asarray([[3, 2] * 9 + [1] * 14, [1, 0] * 16])),
}
MESHES = {"sequence=4": dict(data=2, sequence=4), "all": dict(fsdp=2, sequence=2, tensor=2)}

pytestmark = pytest.mark.xdist_group("context")  # in one process, which asks for each answer once


def inputs(length=T):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    return draw(0, B, N, length, H), draw(1, B, K, length, H), draw(2, B, K, length, H)


def both(mask, way, qkv, weight=None):
    """What comes out, and the gradients of a weighted sum of it."""
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape) if weight is None else weight

    def run(*qkv):
        out = attend(*qkv, mask, way)
        return (out * weight).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, grads


def assert_close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(context, "CHUNK", 4)  # so that there are several


@functools.cache
def whole(mask):
    return both(MASKS[mask], "xla", inputs())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", context.WAYS)
def test_split_tokens_attend_as_whole_rows_do(way, mask, mesh):
    with axes.on(axes.mesh(**MESHES[mesh])):
        got = both(MASKS[mask], way, inputs())
    assert_close(got, whole(mask))


@pytest.mark.parametrize("way", context.WAYS)
def test_a_query_that_sees_nothing_changes_no_other_and_stays_finite(way):
    """Padding of a decoder over texts without padding: backends differ in what it gets, which nobody reads."""
    mask = Mask(causal=False, segments_BT=SEGMENTS, keys_BS=jnp.minimum(SEGMENTS[:, ::-1], 2))
    seen = (mask.segments_BT[:, :, None] == mask.keys_BS[:, None]).any(-1)
    weight = seen[:, None, :, None] * jax.random.normal(jax.random.key(9), (B, N, T, H))
    want, want_grads = both(mask, "xla", inputs(), weight)
    with axes.on(axes.mesh(data=2, sequence=4)):
        got, grads = both(mask, way, inputs(), weight)
    assert np.isfinite(got).all() and not np.asarray(seen).all()
    assert_close((got * seen[:, None, :, None], grads), (want * seen[:, None, :, None], want_grads))


@pytest.mark.parametrize(
    "rows, length, mesh",
    [(1, 32, dict(data=2, sequence=4)), (2, 36, dict(data=2, sequence=4)), (2, 20, dict(data=4, sequence=2))],
    ids=["rows that nobody splits", "halves of nothing", "rows that half of the mesh has"],
)  # fmt: skip
def test_a_ring_takes_other_numbers_too(rows, length, mesh):
    qkv = tuple(x[:rows] for x in inputs(length))
    want = both(Mask(), "xla", qkv)
    with axes.on(axes.mesh(**mesh)):
        assert_close(both(Mask(), "ring", qkv), want)


@pytest.mark.parametrize("way", context.WAYS)
def test_scores_are_capped_and_biased_as_anywhere(way):
    """And what a bias has learned gets its gradient from all devices."""
    graph, params = nnx.split(RelativeBias(8, N, 16, causal=True, rngs=nnx.Rngs(0)))
    mask = Mask(segments_BT=SEGMENTS)

    def gradient(way):
        run = lambda params, q: attend(q, *inputs()[1:], mask, way, 3.0, nnx.merge(graph, params))  # noqa: E731
        weight = jax.random.normal(jax.random.key(9), (B, N, T, H))
        return jax.jit(jax.grad(lambda *x: (run(*x) * weight).sum(), argnums=(0, 1)))(params, inputs()[0])

    want = gradient("xla")
    with axes.on(axes.mesh(fsdp=2, sequence=2, tensor=2)):
        assert_close(gradient(way), want, atol=2e-5)


@pytest.mark.parametrize("way", context.WAYS)
def test_a_packed_neighbour_changes_nothing(way):
    mask, second = Mask(segments_BT=SEGMENTS), np.asarray(SEGMENTS) == 2
    other = tuple(jnp.where(second[:, None, :, None], x, 7.0 - x) for x in inputs())
    with axes.on(axes.mesh(data=2, sequence=4)):
        before, after = (both(mask, way, x, second[:, None, :, None]) for x in (inputs(), other))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        where = second.repeat(a.shape[1], 0).reshape(B, a.shape[1], T)
        np.testing.assert_array_equal(np.asarray(a)[where], np.asarray(b)[where])
    for x in before[1]:
        assert (np.abs(x).max(axis=(1, 3))[~second] == 0).all()


def test_heads_that_are_too_few_go_round_instead():
    with axes.on(axes.mesh(sequence=8)):
        with pytest.raises(Mistake, match=r"'alltoall': 4 heads do not divide over the 8 devices .* choose 'ring'"):
            attend(*inputs(), Mask(), "alltoall")
        text = program(Mask(), "auto")
    assert "collective-permute" in text and "all-to-all" not in text


def program(mask, way):
    """The compiled text of what `both` runs."""
    run = lambda *qkv: attend(*qkv, mask, way).sum()  # noqa: E731
    return jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(*inputs()).compile().as_text()


def test_heads_that_are_enough_are_traded():
    with axes.on(axes.mesh(data=2, sequence=4)):
        text = program(Mask(), "auto")
    assert "all-to-all" in text and "collective-permute" not in text and "all-gather" not in text


def test_a_ring_sends_a_devices_own_keys_and_never_has_all():
    with axes.on(axes.mesh(data=2, sequence=4)):
        text = program(Mask(segments_BT=SEGMENTS), "ring")
    sent = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute(?:-start)?\(", text)
    own = B // 2 * N * T // 4 * H
    assert sent and max(np.prod([int(n) for n in shape.split(",")]) for shape in sent) <= own
    assert "all-gather" not in text and "all-to-all" not in text


def test_devices_of_a_ring_have_as_much_to_do_as_each_other():
    """Pairs of a query and a key that it sees; as they come, the last of four has seven times what the first has."""
    pairs = lambda folded: [  # noqa: E731
        int((context.Ring(("sequence",), 4, 4, folded, 16, 16, None, None).slots(device, 16) + 1).sum())
        for device in range(4)
    ]
    assert len(set(pairs(folded=True))) == 1
    assert pairs(folded=False)[3] > 6 * pairs(folded=False)[0]
