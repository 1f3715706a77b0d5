"""Replaced-token detection: a small generator guesses masked tokens, and the model tells for every token whether it is
a guess (ELECTRA, arXiv:2003.10555).

features   tokens [1 M 6 M 2]   labels [0 5 0 7 0]   weights [0 1 0 1 0]   segments [1 1 1 1 1]   noise 7
loss       the generator reads `tokens` and draws 5 and 9; the model reads [1 5 6 9 2] and is to say [0 0 0 1 0]

Both are trained together, from scratch, for the sum of their losses; nothing flows back through what is drawn. They
share all embeddings. The paper's generator is narrower than the model; here it has its width, and as many layers as
`config.model.generator` says: a quarter to a half of the model's. Once trained, the generator is of no more use.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.nn.linear import Head
from jaxlm.nn.loss import Sums, cross_entropy, tokens_at_once
from jaxlm.objectives import mlm

KINDS = ("encoder",)
EXACT = False
Arrays = Mapping[str, np.ndarray]


def row(length: int, known: Words, *, rate: float = mlm.RATE, unit: str = "token") -> int:
    """As many tokens as the model reads. Raises `Mistake` as `mlm.row` does."""
    return mlm.row(length, known, rate=rate, unit=unit)


def apart() -> bool:
    """The model's part of the loss is a mean over the tokens of the batch."""
    return False


def features(
    row: Arrays, rng: np.random.Generator | None, known: Words, length: int, *, rate: float = mlm.RATE,
    unit: str = "token",
) -> dict[str, np.ndarray]:  # fmt: skip
    """An example of `mlm` in which every chosen token becomes the mask (section 2), and noise for what is drawn."""
    assert rng is not None
    example = mlm.features(row, rng, known, length, rate=rate, unit=unit, mask=1.0, random=0.0)
    return example | {"noise": np.asarray(rng.integers(1 << 31), np.int32)}


def loss(
    model: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    rate: float = mlm.RATE,
    scale: float = 50.0,
    chunk: int | None = None,
) -> Sums:
    """The generator's sums over the chosen tokens (nats), and in the loss `scale` times the model's mean binary
    cross-entropy over all tokens. Raises `Mistake` for a model without a generator.

    `found_...` are the model's: accuracy over all tokens, and of the tokens that are not the text's own, how many of
    those it names are (precision) and how many of those that are it names (recall). Without a key: no dropout.
    """
    if getattr(model, "generator", None) is None:
        named = 'name="bert" or "modernbert" with config.model.generator=1 or more'
        raise Mistake(f"the objective 'electra' needs a generator: {named}")
    tokens, segments = batch["tokens"], batch["segments"]
    keys = (None, None) if key is None else jax.random.split(key)
    x_BTD, _ = model.hidden(tokens, segments_BT=segments, key=keys[0], generator=True)
    few_BTD, labels, weights, places = mlm.gathered(x_BTD, batch, rate)
    few_BTD = model.for_head(few_BTD)
    sums = cross_entropy(few_BTD, model.head, labels, weights, chunk=chunk)

    guesses = _draw(model.head, jax.lax.stop_gradient(few_BTD), batch["noise"])
    own = jnp.where(batch["weights"] > 0, batch["labels"], tokens)
    there = jnp.take_along_axis(own, places, axis=1)
    seen = jnp.put_along_axis(own, places, jnp.where(weights > 0, guesses, there), axis=1, inplace=False)

    real, guessed = (segments > 0).astype(jnp.float32), (seen != own).astype(jnp.float32)
    y_BTD, _ = model.hidden(seen, segments_BT=segments, key=keys[1])
    logits_BT = model.guessed(y_BTD)
    named = (logits_BT > 0).astype(jnp.float32)
    sum_of = lambda x_BT: (x_BT * real).sum()  # noqa: E731
    nll, count, hits = sum_of(jax.nn.softplus(logits_BT) - guessed * logits_BT), real.sum(), sum_of(named * guessed)
    others = {
        "found_loss": (nll, count),
        "found_accuracy": (sum_of(named == guessed), count),
        "found_precision": (hits, sum_of(named)),
        "found_recall": (hits, sum_of(guessed)),
    }
    return sums._replace(loss=sums.loss + scale * nll / jnp.maximum(count, 1.0) * sums.weight, others=others)


def _draw(head: Head, x_BTD: jax.Array, noise_B: jax.Array) -> jax.Array:
    """A token for each state, int32[B, T], by what the head thinks of it and the row's own noise.

    The logits never exist in full: some places of all rows at a time.
    """

    def draw(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BD, place = one
        keys = jax.vmap(lambda noise: jax.random.fold_in(jax.random.key(noise), place))(noise_B)
        return jax.vmap(jax.random.categorical)(keys, head(x_BD[:, None])[:, 0])

    B, T, _ = x_BTD.shape
    at_once = tokens_at_once(B, head.table_VD.shape[0])
    return jax.lax.map(draw, (x_BTD.swapaxes(0, 1), jnp.arange(T)), batch_size=min(at_once, T)).T.astype(jnp.int32)
