"""Promises that every objective keeps. A new file in jaxlm/objectives joins by being there."""

import functools
import importlib
from itertools import islice
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import axes, lookup, objectives
from jaxlm.data import rows, tokenizers
from jaxlm.data.words import Words
from jaxlm.models import Blueprint
from tests.data.test_rows import MemoryStore

LENGTH, BATCH = 64, 8
SPECIALS = ["<mask>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "[NLU]", "[NLG]", "[S2S]"]
MODELS = {  # one for each kind, with every part that an objective may ask for
    "decoder": dict(name="llama", kv_heads=2, head_width=8),
    "encoder": dict(name="bert", context=LENGTH, generator=1),
    "encoder-decoder": dict(name="t5", head_width=8),
}
OPTIONS: dict[str, list[dict]] = {  # besides the defaults: further ways in which an objective is used
    "mlm": [dict(unit="word"), dict(unit="span"), dict(next="nsp"), dict(next="sop")],
    "electra": [dict(unit="span")],
}
STEPS: dict[str, int] = {}  # of objectives that take longer than 80 to learn a batch by heart

NAMES = lookup.names("jaxlm.objectives")
CASES = [(name, options) for name in NAMES for options in [{}, *OPTIONS.get(name, [])]]
every = pytest.mark.parametrize("name, options", CASES, ids=lambda x: x if isinstance(x, str) else str(x or ""))


def module(name):
    return importlib.import_module(f"jaxlm.objectives.{name}")


@functools.cache
def texts():
    """Documents of made-up words, longer and shorter than a row, the same every time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=k)) + "." for k in [3, 9, 20, 40] * 5 + [400] * 8]


@functools.cache
def tokenizer():
    extra = [*SPECIALS, *(f"<extra_id_{i}>" for i in range(100))]
    return tokenizers.train(texts(), dict(kind="huggingface", algorithm="wordpiece", vocab=260, extra=extra))


@functools.cache
def words():
    return Words.of(tokenizer())


@functools.cache
def store():
    documents = [[tokenizer().bos, *tokenizer().encode(text), tokenizer().eos] for text in texts()]
    return MemoryStore(docs=[np.asarray(document) for document in documents])


def task(name, options, kind=None):
    kind = kind or module(name).KINDS[0]
    return objectives.of({"name": name, **options}, length=LENGTH, words=words(), kind=kind)


def batches(task, seed=0, **how):
    stream = rows.train(store(), length=task.row, seed=seed, pairs=task.pairs)
    noise = None if task.exact else seed
    return rows.batches(stream, batch=BATCH, features=task.features, seed=noise, threads=0, **how)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@every
def test_examples_have_fixed_shapes_and_their_tokens_the_length_that_was_asked_for(name, options):
    first, *others = islice(batches(task(name, options)), 6)
    assert first["tokens"].shape == first["segments"].shape == (BATCH, LENGTH)
    assert first["labels"].shape == first["weights"].shape == first.get("decoder_tokens", first["tokens"]).shape
    shapes = {key: (x.shape, x.dtype) for key, x in first.items()}
    assert all({key: (x.shape, x.dtype) for key, x in other.items()} == shapes for other in others)
    assert {x.dtype for key, x in first.items() if key != "weights"} == {np.dtype(np.int32)}
    assert first["weights"].dtype == np.float32


@every
def test_an_example_is_a_function_of_the_seed_and_its_row_alone(name, options):
    one = task(name, options)
    whole = list(islice(batches(one), 5))
    assert same(next(batches(one, start_step=4)), whole[4])
    assert same(next(batches(one, start_step=4)), whole[4]), "again"
    row, rng = rows.train(store(), length=one.row, seed=0, pairs=one.pairs)[3], lambda seed: np.random.default_rng(seed)
    assert same(one.features(row, rng(1)), one.features(row, rng(1)))
    drawn = [one.features(row, rng(seed)) for seed in range(20)]
    assert all(same(drawn[0], other) for other in drawn) == one.exact, "noise, unless it is exact"


@every
@pytest.mark.parametrize("hosts", [2, 4])
def test_a_batch_is_the_same_on_any_number_of_hosts(name, options, hosts):
    one = task(name, options)
    whole, each = next(batches(one, start_step=2)), BATCH // hosts
    parts = [next(batches(one, start_step=2, rows=[(h * each, (h + 1) * each)])) for h in range(hosts)]
    assert same({key: np.concatenate([part[key] for part in parts]) for key in whole}, whole)


@every
def test_a_row_with_enough_text_has_something_to_predict_and_padding_has_nothing(name, options):
    for batch in islice(batches(task(name, options)), 20):
        weights = batch["weights"]
        assert not weights[batch.get("decoder_segments", batch["segments"]) == 0].any()
        full = (batch["segments"] > 0).sum(axis=1) > LENGTH // 2
        assert (weights[full] > 0).any(axis=1).all()
        assert (weights >= 0).all() and batch["tokens"].max() < words().vocab and batch["labels"].max() < words().vocab
        assert batch["tokens"].min() >= 0 and batch["labels"].min() >= 0


ENCODERS = [case for case in CASES if "encoder" in module(case[0]).KINDS]


@pytest.mark.parametrize("name, options", ENCODERS, ids=lambda x: x if isinstance(x, str) else str(x or ""))
def test_no_special_token_is_ever_masked_or_asked_for(name, options):
    for batch in islice(batches(task(name, options)), 20):
        assert not words().special_V[batch["labels"][batch["weights"] > 0]].any()
        changed = (batch["weights"] > 0) & (batch["tokens"] != batch["labels"])
        drawn = set(batch["tokens"][changed].tolist()) - {words().find("mask", ["<mask>", "[MASK]"])}
        assert not words().special_V[np.asarray(sorted(drawn), int)].any()


def blueprint(kind):
    sizes = dict(layers=2, width=32, heads=4, mlp_width=64)
    return Blueprint.of(sizes | MODELS[kind], vocab=words().vocab)


@functools.cache
def fresh(kind):
    return blueprint(kind).init(0)


@every
def test_it_overfits_one_batch(name, options):
    for kind in module(name).KINDS:
        one, model, tx = task(name, options, kind), blueprint(kind), optax.adam(1e-2)
        batch = {key: jnp.asarray(x[:2]) for key, x in next(batches(one, start_step=1)).items()}

        def mean(params, one=one, model=model, batch=batch):
            sums = one.loss(model.bind(params), batch, None)
            return sums.loss / sums.weight, sums

        @jax.jit
        def update(params, opt, mean=mean, tx=tx):
            (_, sums), grads = jax.value_and_grad(mean, has_aux=True)(params)
            updates, opt = tx.update(grads, opt)
            return optax.apply_updates(params, updates), opt, sums

        params, first = fresh(kind), None
        opt = tx.init(params)
        for _ in range(STEPS.get(name, 80)):
            params, opt, sums = update(params, opt)
            first = sums if first is None else first
        assert first.weight > 0 and sums.nll / sums.weight < 0.1 * first.nll / first.weight, kind
        assert sums.correct / sums.weight > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_sum_what_one_does(name):
    for kind in module(name).KINDS:
        one, model, mesh = task(name, {}, kind), blueprint(kind), axes.mesh(fsdp=2, sequence=2, tensor=2)
        batch, params = next(batches(one)), fresh(kind)
        measure = lambda params, batch: one.loss(model.bind(params), batch, None)  # noqa: B023, E731
        want = jax.jit(measure)(params, {key: jnp.asarray(x) for key, x in batch.items()})
        with axes.on(mesh):
            placed = jax.device_put(params, axes.shardings(params, mesh))
            got = jax.jit(measure)(placed, axes.put(batch, BATCH, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)


@every
def test_only_a_loss_that_is_the_sum_of_its_rows_says_so(name, options):
    """A CPU's devices go through rows of their own by that: the loss of the batch is that of its halves, the other half
    empty.
    """
    for kind in module(name).KINDS:
        one, model = task(name, options, kind), blueprint(kind)
        loss = jax.jit(lambda params, batch: one.loss(model.bind(params), batch, None).loss)  # noqa: B023
        batch = next(batches(one, start_step=1))
        first = np.arange(BATCH) < 3
        parts = [{key: (x.T * rows).T.astype(x.dtype) for key, x in batch.items()} for rows in (first, ~first)]
        bold = jax.tree.map(lambda x: 5.0 * x, fresh(kind))  # as drawn, no token is likelier than any other
        whole, halves = float(loss(bold, batch)), sum(float(loss(bold, part)) for part in parts)
        assert one.apart == (abs(whole - halves) < 1e-5 * whole), (kind, whole, halves)


@every
def test_an_option_that_is_not_is_refused(name, options):
    with pytest.raises(lookup.Mistake, match=r"config\.objective needs a name, one of: clm, denoise"):
        objectives.of(dict(rate=0.3), length=LENGTH, words=words(), kind="decoder")
    with pytest.raises(lookup.Mistake, match=r"config\.objective has no 'rtae'"):
        task(name, {**options, "rtae": 0.15})
