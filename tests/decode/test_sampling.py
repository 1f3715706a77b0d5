"""Sampling against exact probabilities, computed the slow and obvious way in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decode import sampling
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake

V, ROWS = 6, 20_000
LOGITS = np.array([1.5, 0.2, -0.3, 1.5, -2.0, 0.9], np.float32)


def probabilities(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What each token's share should be."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    if top_k:
        p = np.where(p >= np.sort(p)[-top_k] - 1e-12, p, 0)
        p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        needed = np.searchsorted(np.cumsum(p[order]), top_p)
        p = np.where(p >= p[order[needed]] - 1e-12, p, 0)
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


def draws(rows=ROWS, seed=0, **how):
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, V))
    return np.asarray(
        jax.jit(sampling.choose)(logits_BV, jax.random.split(jax.random.key(seed), rows), Sampling(**how).rows(rows))
    )


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=1.7),
        dict(top_k=1),
        dict(top_k=3),
        dict(top_k=4, temperature=2.0),
        dict(top_p=0.3),
        dict(top_p=0.65),
        dict(top_p=0.9, top_k=4),
        dict(min_p=0.25),
        dict(min_p=0.5, temperature=0.7),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_the_options_say(how):
    exact = probabilities(**how)
    seen = np.bincount(draws(**how), minlength=V) / ROWS
    assert not seen[exact == 0].any(), "what is cut off never comes"
    np.testing.assert_allclose(seen, exact, atol=5 * (0.25 / ROWS) ** 0.5)


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked():
    assert set(draws(rows=50, temperature=0.0, top_p=0.9, top_k=3).tolist()) == {0}


@pytest.mark.parametrize("vocab", [1, 6, sampling.BLOCK, sampling.BLOCK + 1, 1000])
def test_the_likeliest_is_the_first_of_the_highest_wherever_it_stands(vocab):
    rng = np.random.default_rng(vocab)
    logits_BV = rng.integers(-3, 3, (40, vocab)).astype(np.float32)  # with ties, in one block and across blocks
    logits_BV[0], logits_BV[1, : vocab // 2] = -np.inf, -np.inf
    np.testing.assert_array_equal(jax.jit(sampling.likeliest)(logits_BV), logits_BV.argmax(axis=-1))


def test_equally_likely_tokens_are_kept_or_cut_together():
    kept = sampling.top_k(jnp.array([[1.0, 3.0, 1.0, 0.0]]), jnp.array([2]))
    np.testing.assert_array_equal(kept, [[1.0, 3.0, 1.0, -np.inf]])
    kept = sampling.top_p(jnp.log(jnp.array([[0.2, 0.5, 0.2, 0.1]])), jnp.array([0.6]))
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, True, False]])


@pytest.mark.parametrize("seed", range(3))
def test_nucleus_and_top_k_agree_with_sorting_on_a_real_vocabulary(seed):
    logits = np.random.default_rng(seed).normal(0, 3, (2, 50_257)).astype(np.float32)
    k, p = jnp.array([1, 50]), jnp.array([0.5, 0.95])
    kept = np.isfinite(jax.jit(sampling.top_k)(logits, k))
    np.testing.assert_array_equal(kept.sum(1), [1, 50])
    assert logits[kept].min() >= np.sort(logits[1])[-50]
    kept = np.isfinite(jax.jit(sampling.top_p)(logits, p))
    for row in range(2):
        probs = np.exp(logits[row].astype(np.float64))
        probs = np.sort(probs / probs.sum())[::-1]
        assert (
            abs(kept[row].sum() - 1 - np.searchsorted(np.cumsum(probs), p[row])) <= 1
        )  # a rounding of the sum may cost one


@pytest.mark.parametrize("p", [1e-9, 0.999999, 1.0])
def test_a_nucleus_holds_one_token_at_least_and_at_one_all(p):
    kept = np.isfinite(sampling.top_p(jnp.asarray(LOGITS)[None], jnp.array([p])))[0]
    assert kept[0] and kept.sum() == (2 if p < 0.1 else V), "the two likeliest are equal"


def test_options_differ_between_rows():
    how = Sampling(
        temperature=jnp.array([0.0, 1.0, 1.0]), top_k=jnp.array([0, 1, 0]), top_p=jnp.ones(3),
        min_p=jnp.array([0, 0, 0.99]), repetition_penalty=jnp.ones(3),
        no_repeat_ngram_size=jnp.zeros(3, int), min_new_tokens=jnp.zeros(3, int),
    )  # fmt: skip
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 3)
        assert set(sampling.choose(jnp.stack([jnp.asarray(LOGITS)] * 3), keys, how).tolist()) <= {0, 3}


def constrain(logits, tokens, lengths, stop=(), new=0, most=9, **how):
    """Constrained logits of rows that hold `new` tokens behind their prompt, and may get `most`."""
    B, lengths = len(tokens), np.array(lengths)
    stop_V = np.isin(np.arange(V), list(stop))
    prompts = lengths - np.array(new)
    return np.asarray(
        sampling.constrain(
            jnp.asarray(logits), jnp.array(tokens), prompts, lengths, prompts + most, stop_V, Sampling(**how).rows(B)
        )
    )


def test_the_repetition_penalty_makes_what_was_seen_less_likely_once_whatever_its_sign():
    out = constrain(LOGITS[None], [[0, 4, 4, 5, 5]], [3], repetition_penalty=2.0)
    np.testing.assert_allclose(out[0], [0.75, 0.2, -0.3, 1.5, -4.0, 0.9])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exactly_those_tokens_are_banned_that_would_repeat_an_ngram(size):
    rng = np.random.default_rng(size)
    tokens, lengths = rng.integers(0, V, (40, 12)), rng.integers(1, 13, 40)
    out = constrain(np.zeros((40, V), np.float32), tokens, lengths, no_repeat_ngram_size=size)
    for row, n, got in zip(tokens, lengths, out):
        held = {tuple(row[i : i + size]) for i in range(n - size + 1)}
        banned = [n >= size - 1 and (*row[max(n - size + 1, 0) : n], token) in held for token in range(V)]
        np.testing.assert_array_equal(np.isneginf(got), banned)


def test_a_row_does_not_stop_before_its_least_number_of_new_tokens():
    out = constrain(np.stack([LOGITS] * 2), [[0, 1], [0, 1]], [2, 2], stop=[1, 3], new=[1, 2], min_new_tokens=2)
    np.testing.assert_array_equal(np.isneginf(out), [[False, True, False, True, False, False], [False] * 6])


def test_forced_tokens_stand_alone_at_both_ends_of_what_is_new_whatever_else_is_asked():
    others = dict(repetition_penalty=2.0, no_repeat_ngram_size=1, min_new_tokens=3)
    alone = lambda token: np.where(np.arange(V) == token, 0, -np.inf)  # noqa: E731
    rows = dict(logits=np.stack([LOGITS] * 3), tokens=[[5, 1, 3]] * 3, lengths=[1, 2, 3], new=[0, 1, 2], most=3)
    first, middle, last = constrain(**rows, stop=[3], forced_bos=5, forced_eos=3, **others)
    np.testing.assert_array_equal(first, alone(5))
    np.testing.assert_array_equal(last, alone(3))
    np.testing.assert_array_equal(middle, constrain(**rows, stop=[3], **others)[1])
    np.testing.assert_array_equal(constrain(**rows | dict(most=1), forced_bos=5, forced_eos=0)[0], alone(0))
    np.testing.assert_array_equal(constrain(**rows), np.stack([LOGITS] * 3))


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-0.1),
        dict(top_p=1.2),
        dict(top_k=-1),
        dict(repetition_penalty=0.0),
        dict(min_p=2.0),
        dict(forced_eos=-2),
    ],
)
def test_an_option_out_of_range_is_a_mistake_that_names_it(bad):
    with pytest.raises(Mistake, match=next(iter(bad))):
        Sampling(**bad)
