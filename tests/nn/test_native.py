"""A CPU's own kernels: products with bfloat16 weights, attention to a bfloat16 cache; and what is done without them."""

import dataclasses
import functools
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.decode.engine import Engine
from jaxlm.decode.sampling import Sampling
from jaxlm.models import Blueprint
from jaxlm.nn import native
from jaxlm.nn.attention import HIDDEN, over_bits
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import Tiled, Turned
from jaxlm.nn.mask import Mask, visible
from tests.compiled import compiled

B, K, S, H = 2, 2, 24, 16


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def exact(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def as_floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@compiled
@pytest.mark.parametrize("inner, outer", [(1, 1), (2, 16), (7, 17), (64, 48), (33, 200), (768, 1000), (130, 5003)])
def test_a_product_is_that_of_the_rounded_numbers(inner, outer):
    """Of every number of rows that is cut otherwise into tiles, and with weights of several threads."""
    w = drawn(0, inner, outer)
    tiles = native.tile(np.asarray(w))
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 31):
        x = drawn(rows, rows, inner).astype(jnp.bfloat16)
        found = jax.jit(native.product, static_argnums=2)(x, tiles, outer)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact(x) @ exact(w), rtol=1e-5, atol=2e-5)


@compiled
def test_a_row_of_a_product_has_the_same_bits_alone_and_among_others():
    x, tiles = drawn(0, 15, 96).astype(jnp.bfloat16), native.tile(np.asarray(drawn(1, 96, 80)))
    together = np.asarray(native.product(x, tiles, 80))
    for row in range(15):
        np.testing.assert_array_equal(native.product(x[row : row + 1], tiles, 80)[0], together[row])


@compiled
def test_what_is_no_number_stays_in_its_row_and_is_not_hidden():
    x = drawn(0, 9, 32).astype(jnp.bfloat16).at[3, 5].set(jnp.nan).at[4, 6].set(jnp.inf)
    w = np.asarray(jnp.abs(drawn(1, 32, 40)) + 1)
    found = np.asarray(native.product(x, native.tile(w), 40))
    assert np.isnan(found[3]).all() and np.isposinf(found[4]).all() and np.isfinite(np.delete(found, [3, 4], 0)).all()


@compiled
def test_one_call_after_the_other_gives_the_same_bits():
    """Threads that come late to a call find nothing to do, and do not touch what is no longer there."""
    x, tiles = drawn(0, 8, 256).astype(jnp.bfloat16), native.tile(np.asarray(drawn(1, 256, 4096)))

    @jax.jit
    def often(x):
        first = native.product(x, tiles, 4096)
        same = lambda _, ok: ok & (native.product(x + 0 * ok.astype(x.dtype), tiles, 4096) == first).all()  # noqa: E731
        return jax.lax.fori_loop(0, 2000, same, jnp.bool(True))

    assert often(x)


@compiled
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
    assert cache.k_LBKSH[0].dtype == jnp.uint16 and cache.slots == S
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
        found = over_bits(q, keys, values, mask, cap, bias)
        spread = lambda x: np.repeat(x, heads // K, axis=1)  # noqa: E731
        score = np.einsum("bnth,bnsh->bnts", np.asarray(q, np.float64) * H**-0.5, spread(k))
        score = score if cap is None else cap * np.tanh(score / cap)
        before = lengths[:, None, None] - np.arange(S)[None, None]
        score = score + 0.1 * before[:, None]
        score = score + np.where(visible(mask, jnp.arange(1), jnp.arange(S)), 0.0, HIDDEN)[:, None]
        share = np.exp(score - score.max(-1, keepdims=True))
        want = np.einsum("bnts,bnsh->bnth", share / share.sum(-1, keepdims=True), spread(v))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
        cache, lengths = cache.grow(1), lengths + 1


@compiled
@pytest.mark.parametrize("bias", [None, lambda before: 0.1 * before[:, None].astype(jnp.float32)])
def test_several_queries_see_each_what_is_before_them(bias):
    """And a key that none sees is not read, whatever lies there."""
    q, k, v = drawn(0, B, 3 * K, 4, H), drawn(1, B, K, S, H), drawn(2, B, K, S, H)
    mask = Mask(offset_B=jnp.array([3, 11]))
    hidden = ~visible(mask, jnp.arange(4), jnp.arange(S)).any(1)[:, None, :, None]
    keys, values = (native.bits(jnp.where(hidden, jnp.nan, x)) for x in (k, v))
    score = np.einsum("bnth,bnsh->bnts", np.asarray(q, np.float64) / 4, np.repeat(exact(k), 3, axis=1))
    before = np.array([3, 11])[:, None, None] + np.arange(4)[:, None] - np.arange(S)
    score += (0 if bias is None else 0.1 * before[:, None]) + np.where(before >= 0, 0, HIDDEN)[:, None]
    share = np.exp(score - score.max(-1, keepdims=True))
    want = np.einsum("bnts,bnsh->bnth", share / share.sum(-1, keepdims=True), np.repeat(exact(v), 3, axis=1))
    np.testing.assert_allclose(over_bits(q, keys, values, mask, None, bias), want, rtol=1e-4, atol=1e-5)


@compiled
def test_a_query_has_the_same_bits_alone_and_among_others():
    """Which read each key and value together, though one of them sees fewer."""
    q, keys, values = drawn(0, B, K, 7, H), native.bits(drawn(1, B, K, S, H)), native.bits(drawn(2, B, K, S, H))
    more = jnp.zeros((1, 1, 7, S)).at[0, 0, 2, 9:].set(HIDDEN)
    together = np.asarray(native.attend(q, keys, values, more))
    for row in range(7):
        alone = native.attend(q[:, :, row : row + 1], keys, values, more[:, :, row : row + 1])
        np.testing.assert_array_equal(alone[:, :, 0], together[:, :, row])


@compiled
def test_a_query_that_sees_nothing_gets_the_mean_of_all():
    more = jnp.full((1, 1, 1, S), HIDDEN)
    found = native.attend(drawn(0, B, K, 1, H), *(native.bits(drawn(i, B, K, S, H)) for i in (1, 2)), more)
    np.testing.assert_allclose(found[:, :, 0], exact(drawn(2, B, K, S, H)).mean(2), rtol=1e-4, atol=1e-5)


@compiled
def test_arrays_that_do_not_fit_are_named_and_not_read():
    x, tiles = jnp.ones((2, 8), jnp.bfloat16), native.tile(np.ones((8, 20)))
    with pytest.raises(Exception, match="jaxlm_product: rows, weights and result do not fit"):
        native.product(x, tiles, 40).block_until_ready()
    q, more = jnp.ones((B, K, 1, H)), jnp.zeros((1, 1, 1, S))
    keys, fewer = (native.bits(jnp.ones((B, K, slots, H))) for slots in (S, S - 1))
    for wrong in ((q, keys, fewer, more), (q, fewer, fewer, more), (q, keys, keys, more[..., 1:])):
        with pytest.raises(Exception, match="jaxlm_attend: queries, keys, values and what is added do not fit"):
            native.attend(*wrong).block_until_ready()
    assert native.product(x[:0], tiles, 20).shape == (0, 20)


@compiled
def test_what_finds_no_room_is_dropped():
    """Rows of 22 and 24 tokens in 24 slots: of three more one is lost, and all."""
    lengths_B = jnp.array([S - 2, S])
    k, v, more_k, more_v = (drawn(i, B, K, S if i < 2 else 3, H).astype(jnp.bfloat16) for i in range(4))
    full = Cache.empty(1, B, K, S, H, jnp.dtype("bfloat16")).write(0, k, v).unstacked()
    found = dataclasses.replace(full, lengths_B=lengths_B).write(0, more_k, more_v).read(0)
    for bits, old, new in zip(found, (k, v), (more_k, more_v)):
        np.testing.assert_array_equal(as_floats(bits), old.at[0, :, S - 2 :].set(new[0, :, :2]))


@compiled
def test_rows_are_picked_and_the_last_token_is_in_its_place():
    cache = Cache.empty(1, B, K, S, H, jnp.dtype("bfloat16"))
    k, v = drawn(0, B, K, 3, H), drawn(1, B, K, 3, H)
    cache = cache.write(0, k, v).grow(3).unstacked().rows(jnp.array([1, 1, 0]))
    for bits, x in zip(cache.read(0), (k, v)):
        assert bits.shape == (3, K, S, H)
        np.testing.assert_array_equal(as_floats(bits)[:, :, :3], x[jnp.array([1, 1, 0])].astype(jnp.bfloat16))


def test_only_bfloat16s_of_one_device_are_held_as_bits(monkeypatch):
    kept = lambda dtype: Cache.empty(1, 8, K, S, H, jnp.dtype(dtype)).unstacked().k_LBKSH[0].dtype  # noqa: E731
    assert kept("float32") == kept("float16") == jnp.float32
    assert kept("bfloat16") == (jnp.uint16 if native.ready() else jnp.float32)
    with axes.on(axes.mesh(data=8)):
        assert kept("bfloat16") == jnp.float32
    monkeypatch.setattr(native, "ready", lambda: False)
    assert kept("bfloat16") == jnp.float32


@compiled
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "mixtral", "t5"])
def test_tokens_read_one_by_one_have_the_logits_of_all_at_once(name):
    """In bfloat16: as near to float32's as those that one pass over the row gives."""
    sizes = dict(gpt2={}, t5=dict(head_width=8, mlp_width=24)).get(name, dict(kv_heads=1, head_width=8, mlp_width=24))
    section = dict(name=name, layers=2, width=16, heads=2, context=32, **sizes)
    half, full = (Blueprint.of(section, vocab=40, dtype=dtype) for dtype in ("bfloat16", "float32"))
    params = jax.tree.map(lambda x: 4 * x, half.init(2))  # with others a router sometimes chooses otherwise
    tokens_BT = jax.random.randint(jax.random.key(3), (2, 16), 0, 40)

    def one_by_one(blueprint):
        model, found = blueprint.bind(params), []
        cache = model.empty_cache(2, 32)
        if name == "t5":
            real = jnp.ones_like(tokens_BT)
            cache = model.remember(cache, model.encode(tokens_BT, segments_BS=real), real)
        x, cache = model.hidden(tokens_BT[:, :4], cache=cache)
        found.append(model.head(x))
        cache = cache.unstacked()
        assert (cache.k_LBKSH[0].dtype == jnp.uint16) == (blueprint is half)
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


def continued(blueprint, params) -> tuple[type, list[list[int]]]:
    """What an engine holds weights as, and what it writes."""
    engine = Engine(blueprint, params)
    prompts, how = [[3, 5, 7], [11, 2]], Sampling(temperature=0)
    rows = engine.generate(prompts, how, max_new_tokens=6, copies=3)
    table = engine.decoding()[1]
    return type(table), rows


@compiled
@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_without_a_compiler_the_same_is_written(name, monkeypatch):
    sizes = dict(mlp_width=24) if name == "t5" else {}
    section = dict(name=name, context=32, layers=2, width=16, heads=2, **sizes)
    blueprint = Blueprint.of(section, vocab=40, dtype="bfloat16")
    params = jax.tree.map(lambda x: 8 * x, blueprint.init(0))  # so that no two logits are near each other
    held, rows = continued(blueprint, params)
    monkeypatch.setattr(native, "ready", lambda: False)
    assert (held, Turned) == (Tiled, continued(blueprint, params)[0])
    assert rows == continued(blueprint, params)[1]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """One where no kernels were made before, and what is asked of it."""
    for name in ("CXX", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))  # made in a third of the time
    return tmp_path / "home"


@pytest.mark.parametrize(
    "compiler, told",
    [
        ("", "CXX is empty"), ("no-such-c++ -O3", "no-such-c++"), ("false", "'false'"), ("true", "native-"),
        ('c++ "', "No closing quotation"), (r"sh -c 'printf told\\377 >&2; exit 1'", "told"),
    ],
)  # fmt: skip
def test_a_compiler_that_is_none_is_named_once_and_leaves_nothing(home, monkeypatch, caplog, compiler, told):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "_loaded", functools.cache(native._loaded.__wrapped__))
    assert not native.ready() and not native.ready()
    (record,) = caplog.records
    assert "no kernels from a C++ compiler" in record.getMessage() and told in record.getMessage()
    assert not [path for path in home.rglob("*") if path.is_file()]


@compiled
def test_kernels_are_kept_for_the_next_start(home, monkeypatch):
    native._library()
    (library,) = home.rglob("*.so")
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        native._library()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.CalledProcessError):
        native._library()


@compiled
def test_kernels_that_cannot_be_loaded_are_made_anew(home, monkeypatch):
    """A home may be that of several systems, and one lack the libraries that another linked to."""
    native._library()
    (library,) = home.rglob("*.so")
    library.unlink()  # what is loaded is not written to
    library.write_bytes(b"of another system")
    assert all(hasattr(native._library(), name) for name in native.KERNELS)
    assert library.read_bytes() != b"of another system"
    monkeypatch.setenv("PATH", "")
    assert all(hasattr(native._library(), name) for name in native.KERNELS), "as they were kept"


@compiled
def test_a_home_that_cannot_be_written_does_not_matter(home, monkeypatch):
    home.touch()
    native._library()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home.with_name("named")))
    native._library()
    assert [*home.with_name("named").glob("*.so")]


@compiled
def test_threads_get_the_same_kernels_and_leave_nothing_where_nothing_is_kept(tmp_path):
    code = """
import concurrent.futures
from jaxlm.nn import native
with concurrent.futures.ThreadPoolExecutor(4) as threads:
    print(*threads.map(lambda _: native.ready(), range(4)))
"""
    env = os.environ | dict(JAX_COMPILATION_CACHE_DIR="", TMPDIR=str(tmp_path), JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr
    assert not [*tmp_path.iterdir()]


def test_they_are_a_cpu_s_alone(monkeypatch):
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    assert not native.ready()
