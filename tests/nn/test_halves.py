"""A cache in bfloat16 on a CPU: the same numbers, written and read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import Blueprint
from jaxlm.nn import halves
from jaxlm.nn.attention import HIDDEN, over_halves
from jaxlm.nn.cache import Cache
from jaxlm.nn.mask import Mask, visible

B, K, S, H = 2, 2, 24, 16


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_that_of_the_rounded_cache(rows, turned):
    held = drawn(0, B, K, S, H)
    bits = halves.hold(held, turned=turned)
    a = drawn(1, B, K, rows, H if turned else S)
    a = a if rows == 1 else a.astype(jnp.bfloat16)  # one row is not rounded
    exact = np.asarray(held.astype(jnp.bfloat16), np.float64)
    want = np.einsum("bkrh,bksh->bkrs" if turned else "bkrs,bksh->bkrh", np.asarray(a, np.float64), exact)
    for found in (halves.product(a, bits), jax.jit(halves.product)(a, bits)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [K, 3 * K])
def test_attention_over_it_is_that_over_what_was_written(heads, window, cap):
    """Rows of several lengths, tokens written one after the other; heads that share keys; against float64."""
    cache = Cache.empty(1, B, K, S, H, jnp.dtype("bfloat16"))
    first = [drawn(seed, B, K, 7, H).astype(jnp.bfloat16) for seed in (0, 1)]
    cache = cache.write(0, *first).grow(7)
    lengths = np.array([7, 5])
    cache = dataclasses.replace(cache.unstacked(), lengths_B=jnp.asarray(lengths))
    assert halves.is_held(cache.k_LBKSH[0]) and cache.slots == S
    k, v = (np.zeros((B, K, S, H)) for _ in range(2))
    k[:, :, :7], v[:, :, :7] = (np.asarray(x, np.float64) for x in first)
    bias = lambda before: 0.1 * before[:, None].astype(jnp.float32)  # noqa: E731
    for step in range(3):
        new = [drawn(10 + 2 * step + i, B, K, 1, H).astype(jnp.bfloat16) for i in (0, 1)]
        cache, keys, values = cache.extend(0, *new)
        for b, length in enumerate(lengths):
            k[b, :, length], v[b, :, length] = (np.asarray(x, np.float64)[b, :, 0] for x in new)
        q = drawn(20 + step, B, heads, 1, H).astype(jnp.bfloat16)
        mask = Mask(window=window, offset_B=jnp.asarray(lengths))
        found = over_halves(q, keys, values, mask, cap, bias)
        spread = lambda x: np.repeat(x, heads // K, axis=1)  # noqa: E731
        score = np.einsum("bnth,bnsh->bnts", np.asarray(q, np.float64) * H**-0.5, spread(k))
        score = score if cap is None else cap * np.tanh(score / cap)
        before = lengths[:, None, None] - np.arange(S)[None, None]
        score = score + 0.1 * before[:, None]
        score = score + np.where(visible(mask, jnp.arange(1), jnp.arange(S)), 0.0, HIDDEN)[:, None]
        share = np.exp(score - score.max(-1, keepdims=True))
        want = np.einsum("bnts,bnsh->bnth", share / share.sum(-1, keepdims=True), spread(v))
        np.testing.assert_allclose(found, want, rtol=0.02 if heads > K else 1e-4, atol=0.01 if heads > K else 1e-4)
        cache, lengths = cache.grow(1), lengths + 1


def test_what_finds_no_room_is_dropped():
    """Rows of 22 and 24 tokens in 24 slots: of three more one is lost, and all."""
    lengths_B = jnp.array([S - 2, S])
    k, v, more_k, more_v = (drawn(i, B, K, S if i < 2 else 3, H).astype(jnp.bfloat16) for i in range(4))
    full = Cache.empty(1, B, K, S, H, jnp.dtype("bfloat16")).write(0, k, v).unstacked()
    keys, values = (
        jax.lax.bitcast_convert_type(x, jnp.bfloat16)
        for x in dataclasses.replace(full, lengths_B=lengths_B).write(0, more_k, more_v).read(0)
    )
    for found, old, new in ((keys.swapaxes(-1, -2), k, more_k), (values, v, more_v)):
        np.testing.assert_array_equal(found, old.at[0, :, S - 2 :].set(new[0, :, :2]))


def test_rows_are_picked_and_the_last_token_is_in_its_place():
    cache = Cache.empty(1, B, K, S, H, jnp.dtype("bfloat16"))
    k, v = drawn(0, B, K, 3, H), drawn(1, B, K, 3, H)
    cache = cache.write(0, k, v).grow(3).unstacked().rows(jnp.array([1, 1, 0]))
    keys, values = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in cache.read(0))
    assert keys.shape == (3, K, H, S) and values.shape == (3, K, S, H)
    np.testing.assert_array_equal(keys[..., :3].swapaxes(-1, -2), k[jnp.array([1, 1, 0])].astype(jnp.bfloat16))
    np.testing.assert_array_equal(values[:, :, :3], v[jnp.array([1, 1, 0])].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "slots, width, dtype", [(S, H, "float32"), (S, 12, "bfloat16"), (S + 1, H, "bfloat16"), (S, H, "float16")]
)
def test_what_does_not_fit_stays_in_float32(slots, width, dtype):
    cache = Cache.empty(1, B, K, slots, width, jnp.dtype(dtype)).unstacked()
    assert cache.k_LBKSH[0].dtype == jnp.float32 and cache.k_LBKSH[0].shape == (B * K, slots, width)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "mixtral", "t5"])
def test_tokens_read_one_by_one_have_the_logits_of_all_at_once(name):
    """In bfloat16: as near to float32's as those that one pass over the row gives."""
    sizes = dict(gpt2={}, t5=dict(head_width=8, mlp_width=24)).get(name, dict(kv_heads=1, head_width=8, mlp_width=24))
    section = dict(name=name, layers=2, width=16, heads=2, context=32, **sizes)
    half, full = (Blueprint.of(section, vocab=40, dtype=dtype) for dtype in ("bfloat16", "float32"))
    params = jax.tree.map(lambda x: 4 * x, half.init(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 16), 0, 40)

    def one_by_one(blueprint):
        model, found = blueprint.bind(params), []
        cache = model.empty_cache(2, 32)
        if name == "t5":
            real = jnp.ones_like(tokens_BT)
            cache = model.remember(cache, model.encode(tokens_BT, segments_BS=real), real)
        x, cache = model.hidden(tokens_BT[:, :4], cache=cache)
        found.append(model.head(x))
        cache = cache.unstacked()
        assert halves.is_held(cache.k_LBKSH[0]) == (blueprint is half)
        read = jax.jit(lambda cache, token_B1: model.hidden(token_B1, cache=cache))
        for t in range(4, 16):
            x, cache = read(cache, tokens_BT[:, t : t + 1])
            found.append(model.head(x))
        return np.asarray(jnp.concatenate(found, axis=1), np.float64)

    def at_once(blueprint):
        model = blueprint.bind(params)
        return np.asarray(model(*(tokens_BT,) * (1 + (name == "t5")))[0], np.float64)

    exact = at_once(full)
    np.testing.assert_allclose(one_by_one(full), exact, rtol=1e-3, atol=1e-3)
    away = lambda found: np.sqrt(np.mean((found - exact) ** 2))  # noqa: E731
    assert away(one_by_one(half)) < 1.5 * away(at_once(half)) + 1e-4
