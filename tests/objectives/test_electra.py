"""Replaced-token detection: what the generator draws, what is asked of the model, and where gradients flow."""

import functools

from hypothesis import given
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn.linear import Head
from jaxlm.objectives import electra, mlm
from tests.objectives.test_mlm import KNOWN, MASKED, V, documents_, packed, rates, seeds, units
from tests.trees import noisy


def example(row, seed, **options):
    return electra.features(row, np.random.default_rng(seed), KNOWN, len(row["tokens"]), **options)


@given(documents_, seeds, units, rates)
def test_every_chosen_token_becomes_the_mask_and_the_original_is_in_the_example(documents, seed, unit, rate):
    row = packed(documents)
    one = example(row, seed, unit=unit, rate=rate)
    chosen = one["weights"] > 0
    assert (one["tokens"][chosen] == MASKED).all() and not KNOWN.special_V[row["tokens"][chosen]].any()
    np.testing.assert_array_equal(np.where(chosen, one["labels"], one["tokens"]), row["tokens"])
    assert not (one["tokens"][~chosen] == MASKED).any()


def test_rows_have_noise_of_their_own():
    row = packed([[(1, 2)] * 5])
    assert len({int(example(row, seed)["noise"]) for seed in range(50)}) == 50


@functools.cache
def model(**more):
    sizes = dict(name="bert", layers=2, width=16, heads=2, mlp_width=32, context=64, generator=1) | more
    return Blueprint.of(sizes, vocab=V)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    row = packed([[(int(w), 1) for w in rng.integers(1, 11, n)] for n in (9, 12)], 64)
    examples = [example(row, seed) for seed in range(4)]
    return {name: jnp.asarray(np.stack([e[name] for e in examples])) for name in examples[0]}


@functools.cache
def params():
    return noisy(model())


def test_what_is_drawn_has_the_probabilities_of_the_head():
    table = jnp.asarray([[0.0], [1.0], [2.0], [-1.0]])
    drawn = jax.jit(lambda n: electra._draw(Head(table), jnp.ones((4000, 5, 1)), n))(jnp.arange(4000))
    shares = np.stack([np.bincount(np.asarray(drawn[:, place]), minlength=4) / 4000 for place in range(5)])
    np.testing.assert_allclose(shares, np.tile(jax.nn.softmax(table[:, 0]), (5, 1)), atol=5 * (0.25 / 4000) ** 0.5)


def test_a_draw_depends_on_the_row_alone_and_not_on_how_many_are_made_at_once(monkeypatch):
    head, x_BTD = Head(jax.random.normal(jax.random.key(0), (50, 4))), jax.random.normal(jax.random.key(1), (6, 7, 4))
    whole = electra._draw(head, x_BTD, jnp.arange(6))
    np.testing.assert_array_equal(electra._draw(head, x_BTD[2:4], jnp.arange(2, 4)), whole[2:4])
    monkeypatch.setattr(electra, "tokens_at_once", lambda rows, vocab: 3)
    np.testing.assert_array_equal(electra._draw(head, x_BTD, jnp.arange(6)), whole)


def test_the_model_is_asked_for_every_token_whether_it_is_the_texts_own():
    """By hand, from what the generator draws."""
    bound, b = model().bind(params()), batch()
    sums = jax.jit(lambda p: electra.loss(model().bind(p), b))(params())
    hidden = jax.jit(
        lambda tokens_BT, by: bound.hidden(tokens_BT, segments_BT=b["segments"], generator=by)[0], static_argnums=1
    )
    x_BTD = hidden(b["tokens"], True)
    few_BTD, _, weights, places = mlm.gathered(x_BTD, b, mlm.RATE)
    drawn = np.asarray(electra._draw(bound.head, bound.for_head(few_BTD), b["noise"]))
    own = np.where(b["weights"] > 0, b["labels"], b["tokens"])
    seen = own.copy()
    for r, t in np.argwhere(np.asarray(weights) > 0):
        seen[r, places[r, t]] = drawn[r, t]
    p_BT = np.asarray(jax.nn.sigmoid(bound.guessed(hidden(jnp.asarray(seen), False))))
    real, guess = np.asarray(b["segments"]) > 0, seen != own
    assert guess.any() and (guess <= (np.asarray(b["weights"]) > 0)).all(), "a guess that is right is the text's own"
    nll = -np.log(np.where(guess, p_BT, 1 - p_BT))[real]
    (total, count), named = sums.others["found_loss"], (p_BT > 0.5) & real
    assert count == real.sum() and total / count == pytest.approx(nll.mean(), rel=1e-4)
    assert sums.loss == pytest.approx(float(sums.nll + 50 * nll.mean() * sums.weight), rel=1e-4)
    want = {
        "found_accuracy": (named == guess)[real].mean(),
        "found_precision": (named & guess).sum() / named.sum(),
        "found_recall": (named & guess).sum() / guess.sum(),
    }
    for name, share in want.items():
        assert sums.others[name][0] / sums.others[name][1] == pytest.approx(share, rel=1e-5)


def test_the_models_loss_does_not_teach_the_generators_layers():
    b = batch()

    def gradient(scale):
        return jax.jit(jax.grad(lambda p: electra.loss(model().bind(p), b, scale=scale).loss))(params())

    alone, both = gradient(0.0), gradient(50.0)
    for part in ("generator", "transform", "transform_norm", "bias_V"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), alone[part], both[part])
    assert not any(np.any(x) for x in jax.tree.leaves(alone["blocks"])), "nor the generator's the model's"
    assert np.abs(both["embed_VD"] - alone["embed_VD"]).max() > 1e-3, "both teach the embeddings"


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_generator_reads_and_drops_as_the_model_does(name):
    blueprint, own = model(name=name, dropout=0.5), noisy(model(name=name))
    read = jax.jit(lambda p, t, key: blueprint.bind(p).hidden(t, key=key, generator=True)[0])
    tokens = batch()["tokens"]
    one, again, other = (read(own, tokens, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    packed_ = jax.jit(lambda p, t, s: model(name=name).bind(p).hidden(t, segments_BT=s, generator=True)[0])
    segments = batch()["segments"]
    first = int((segments[0] == 1).sum())
    changed = tokens.at[:, :first].set(7)
    same = packed_(own, tokens, segments)[:, first:], packed_(own, changed, segments)[:, first:]
    np.testing.assert_array_equal(*same)
    models_own = blueprint.bind(own).hidden(tokens, segments_BT=segments)[0]
    assert np.abs(models_own - packed_(own, tokens, segments)).max() > 1e-3, "its layers are others"


def test_a_model_without_a_generator_is_refused():
    bare = model(generator=0)
    with pytest.raises(Mistake, match=r"'electra' needs a generator: .*config\.model\.generator=1"):
        electra.loss(bare.bind(bare.init(0)), batch())
    with pytest.raises(Mistake, match=r"config\.objective\.rate is a share"):
        electra.row(64, KNOWN, rate=2)
