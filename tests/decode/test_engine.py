"""The engine's promises: it writes what the model alone would, and compiles once per bucket.

Held by one family with keys and values and one with states: what a cache gives is tests/test_models.py's, for every
family, and what is written tests/test_hf_generate.py's.
"""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.decode.engine import Engine, bucket, read
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from tests import test_models as families
from tests.trees import noisy

MODELS = ["gpt2", "rnn"]
V, CONTEXT = 40, 64
SIZES = dict(layers=2, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=32, context=CONTEXT)
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    config = importlib.import_module(f"jaxlm.models.{request.param}").Config
    known = {field.name for field in dataclasses.fields(config)}
    model = Blueprint.of({"name": request.param} | {k: v for k, v in SIZES.items() if k in known}, vocab=V)
    return Engine(model, noisy(model))


@pytest.fixture(scope="module")
def alone(engine):
    """Logits [T, V] of one row, in one pass and without a cache."""
    forward = jax.jit(lambda tokens_BT: engine.blueprint.bind(engine.params)(tokens_BT)[0])
    return lambda tokens: np.asarray(forward(np.pad(np.array([tokens]), ((0, 0), (0, CONTEXT - len(tokens))))))[
        0, : len(tokens)
    ]


@pytest.fixture
def compilations():
    """How many programs XLA has compiled since the test began."""
    count = [0]

    def listen(event: str, seconds: float, **_: object) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def test_rows_of_different_lengths_are_continued_as_one_pass_over_each_would(engine, alone):
    for prompt, new in zip(PROMPTS, engine.generate(PROMPTS, GREEDY, max_new_tokens=20)):
        assert new == alone(prompt + new)[len(prompt) - 1 : -1].argmax(-1).tolist() and len(new) == 20


def test_token_by_token_gives_the_logits_of_one_pass(engine, alone):
    state, _ = engine.start(PROMPTS, 8)
    rest = np.random.default_rng(0).integers(0, V, (8, 3))
    step = jax.jit(lambda params, cache, token_B: read(engine.blueprint.bind(params), cache, token_B))
    logits, cache = step(engine.decoding()[0], state.cache, np.array([prompt[-1] for prompt in PROMPTS]))
    for t in range(8):
        for row, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(logits[row], alone([*prompt, *rest[:t, row]])[-1], atol=1e-5)
        logits, cache = step(engine.decoding()[0], cache, rest[t])


def test_a_row_writes_the_same_alone_and_among_others_and_however_often_the_host_looks(engine):
    how = Sampling(temperature=1.0, top_k=12, top_p=0.9, repetition_penalty=1.3, no_repeat_ngram_size=3)
    together = engine.generate(PROMPTS, how, max_new_tokens=20, copies=2, seed=3)
    for number, prompt in enumerate(PROMPTS):
        by_itself = engine.generate([prompt], how, max_new_tokens=20, copies=2, seed=3, ids=[number], steps=3)
        assert by_itself == together[2 * number : 2 * number + 2]


def test_seeds_copies_and_places_draw_apart_and_again_the_same(engine):
    write = lambda prompts, **more: engine.generate(prompts, Sampling(), max_new_tokens=16, **more)  # noqa: E731
    a, b = write([[5], [5]], seed=1)
    assert a != b and write([[5], [5]], seed=1) == [a, b]
    assert write([[5], [5]], seed=2) != [a, b]
    copies = write([[5]], seed=1, copies=3)
    assert len({tuple(row) for row in copies}) == 3 and copies[0] == a
    assert write([[5]], seed=1, ids=[1]) == [b]


@pytest.mark.parametrize("devices", [0, 1, 2], ids=["anywhere", "a mesh of one", "a mesh of two"])
def test_nothing_is_compiled_again_for_a_length_within_the_bucket_or_for_an_option_or_a_token(
    engine, compilations, devices
):
    params = engine.blueprint.init(0, axes.mesh(fsdp=devices, devices=jax.devices()[:devices]) if devices else None)
    engine = Engine(engine.blueprint, params)
    engine.generate([[1] * 9, [2]], GREEDY, max_new_tokens=20, stop=[3], steps=8)
    assert engine.traces == dict(prefill=1, decode=1) and compilations[0] >= 2
    compilations[0] = 0
    options = [
        GREEDY, Sampling(temperature=0.7), Sampling(top_k=4), Sampling(top_p=0.5, min_p=0.1),
        Sampling(repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=3),
        Sampling(forced_bos=4, forced_eos=5),
    ]  # fmt: skip
    for i, how in enumerate(options):
        prompts = [[4] * (i + 1), [5] * 12]
        engine.generate(
            prompts, how, max_new_tokens=5 + 3 * i, stop=range(i), seed=i, steps=2 + i, watch=lambda row, new: False
        )
    assert engine.traces == dict(prefill=1, decode=1)
    assert compilations[0] == 0


def test_a_row_ends_before_a_stop_token_and_goes_no_further_than_the_context(engine):
    whole = engine.generate(PROMPTS, GREEDY, max_new_tokens=1000)
    assert [len(prompt) + len(new) for prompt, new in zip(PROMPTS, whole)] == [CONTEXT] * 3
    stop = whole[0][7]
    for new, full in zip(engine.generate(PROMPTS, GREEDY, max_new_tokens=1000, stop=[stop]), whole):
        assert new == (full[: full.index(stop)] if stop in full else full)
    late = engine.generate(PROMPTS, Sampling(temperature=0, min_new_tokens=30), max_new_tokens=40, stop=range(V - 1))
    assert all(new[:30] == [V - 1] * 30 for new in late), "only one token may come before the rest may end it"


def test_a_row_begins_and_ends_as_forced_and_in_between_as_its_logits_say(engine, alone):
    how = Sampling(temperature=0, forced_bos=7, forced_eos=9)
    for most, stop in ((12, []), (12, [9]), (1, []), (1000, [])):
        for prompt, new in zip(PROMPTS, engine.generate(PROMPTS, how, max_new_tokens=most, stop=stop)):
            room = min(most, CONTEXT - len(prompt))
            free = max(room - 2, 0)
            begun = [7] * (room > 1) + alone(prompt + new)[len(prompt) : len(prompt) + free].argmax(-1).tolist()
            if stop and 9 in begun:  # as the logits have it, before the row is full
                begun = begun[: begun.index(9)]
            assert new == begun + [9] * (not stop)


@pytest.mark.parametrize("name", [name for name in families.MODELS if families.kind(name) != "encoder"])
def test_rows_and_heads_that_are_split_over_devices_are_continued_as_on_one(name, monkeypatch):
    """In the layout of accelerators, whose layers and cache are stacks."""
    more = {} if name == "rnn" else dict(attention="xla")  # kernels are for devices that are not here
    model, rng = families.blueprint(name, **more), np.random.default_rng(0)
    params, how = noisy(model), Sampling(temperature=0, repetition_penalty=1.2)
    prompts = [rng.integers(0, families.V, n).tolist() for n in (3, 1, 9, 5)]
    want = Engine(model, params).generate(prompts, how, max_new_tokens=12)
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    mesh = axes.mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with axes.on(mesh):
        split = Engine(model, jax.device_put(params, axes.shardings(params, mesh)))
        assert split.generate(prompts, how, max_new_tokens=12) == want


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_a_model_that_recomputes_in_training_is_continued_alike(remat):
    sizes = dict(name="llama", layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, context=32)
    plain, model = Blueprint.of(sizes, vocab=V), Blueprint.of(sizes | dict(remat=remat), vocab=V)
    ask = lambda one: Engine(one, plain.init(0)).generate([[1, 2]], Sampling(temperature=0), max_new_tokens=6)  # noqa: E731
    assert ask(model) == ask(plain)


def test_what_an_encoder_read_is_kept_once_however_many_rows_write_about_it():
    sizes = dict(layers=1, width=16, heads=2, head_width=8, mlp_width=16)
    model = Blueprint.of(dict(name="t5", **sizes), vocab=V)
    state, _ = Engine(model, model.init(0)).start([[1, 2, 3], [4]], 8, copies=3)
    assert len(state.done_B) == 6
    assert {x.shape[1] for x in state.cache.cross} == {2} and len(state.cache.real) == 2


def test_a_row_ends_where_constraints_leave_no_token(engine):
    how = Sampling(temperature=0, no_repeat_ngram_size=1)
    for prompt, new in zip(PROMPTS, engine.generate(PROMPTS, how, max_new_tokens=50)):
        assert sorted(prompt + new) == [*range(V)]


def test_the_watcher_sees_every_token_once_and_may_end_a_row(engine):
    seen = {0: [], 1: []}

    def watch(row, new):
        seen[row] += new
        return row == 1 and len(seen[1]) >= 6

    new = engine.generate(PROMPTS[:2], GREEDY, max_new_tokens=20, steps=3, watch=watch)
    assert new == [seen[0], seen[1]] and len(new[0]) == 20 and len(new[1]) == 6
    assert new[1] == engine.generate(PROMPTS[:2], GREEDY, max_new_tokens=6)[1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_ngram_never_comes_twice(engine, size):
    how = Sampling(temperature=0, no_repeat_ngram_size=size)
    for prompt, new in zip(PROMPTS, engine.generate(PROMPTS, how, max_new_tokens=25)):
        row = prompt + new
        grams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
        assert len(set(grams)) == len(grams)
    plain = engine.generate(PROMPTS, GREEDY, max_new_tokens=25)
    assert any(len({tuple(row[i : i + size]) for i in range(25)}) < 25 for row in plain), (
        "left alone, it repeats itself"
    )


def test_a_prompt_that_is_empty_or_fills_the_context_is_a_mistake(engine):
    for prompts, complaint in (([[1], []], "no token"), ([[1] * CONTEXT], "leaves no room")):
        with pytest.raises(Mistake, match=complaint):
            engine.generate(prompts, GREEDY, max_new_tokens=2)


def test_buckets_waste_a_third_at_most():
    sizes = {bucket(n) for n in range(1, 1025)}
    assert len(sizes) == 20 and all(n <= bucket(n) <= max(1.5 * n, n + 1) for n in range(1, 1025))
    assert bucket(3, 16) == 16 and bucket(100, 16, 120) == 120
