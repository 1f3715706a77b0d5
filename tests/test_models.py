"""Promises that every trainable model family keeps. A new file in jaxlm/models joins by being there."""

import dataclasses
import functools
import importlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes, lookup
from jaxlm.models import Blueprint
from jaxlm.nn.attention import BACKENDS
from jaxlm.objectives import clm
from tests.trees import noisy

MODELS = [
    name for name in lookup.names("jaxlm.models") if hasattr(importlib.import_module(f"jaxlm.models.{name}"), "Config")
]
V, T = 32, 12
SIZES = dict(layers=2, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=32, context=32, experts=4, balance=0.0)


@functools.cache
def blueprint(name, **more):
    """A tiny model of a family: of the common sizes, those that its Config knows."""
    known = {f.name for f in dataclasses.fields(importlib.import_module(f"jaxlm.models.{name}").Config)}
    return Blueprint.of({"name": name, **{k: v for k, v in SIZES.items() if k in known}, **more}, vocab=V)


def kind(name):
    return blueprint(name).kind


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


DECODERS = [name for name in MODELS if kind(name) == "decoder"]
decoders = pytest.mark.parametrize("name", DECODERS, indirect=True, scope="module")


def read(model, tokens_BT, segments_BT=None, **where):
    """Logits; an encoder-decoder writes about a row what stands in it."""
    if importlib.import_module(type(model.config).__module__).KIND == "encoder-decoder":
        return model(tokens_BT, tokens_BT, segments_BS=segments_BT, segments_BT=segments_BT, **where)[0]
    return model(tokens_BT, segments_BT=segments_BT, **where)[0]


def objective(model, batch):
    """A loss over all tokens that have a weight: the next token, or for an encoder any label."""
    if importlib.import_module(type(model.config).__module__).KIND == "decoder":
        return clm.loss(model, batch).loss
    logits_BTV = read(model, batch["tokens"], segments_BT=batch["segments"])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch["labels"][..., None], -1)[..., 0]
    return -(picked * batch["weights"]).sum()


@functools.cache
def fresh(name):
    return blueprint(name).init(0)


@pytest.fixture(scope="module")
def params(name):
    return noisy(blueprint(name))


@pytest.fixture(scope="module")
def tokens_BT():
    return jax.random.randint(jax.random.key(0), (2, T), 0, V)


# Compiling is what takes the time: a family's programs are compiled once, for rows of T tokens.


@functools.cache
def reader(name, **more):
    return jax.jit(lambda p, t, w: read(blueprint(name, **more).bind(p), t, **w))


def logits_of(name, params, tokens_BT, backend=None, **where):
    """From the program of the family, or of its model with this backend of its attention."""
    return reader(name, **({"attention": backend} if backend else {}))(params, tokens_BT, where)


def alone(name, params, tokens_BT, backend=None):
    """Logits of short rows that nothing stands beside; a decoder's in front of what cannot change them."""
    length = tokens_BT.shape[1]
    rows_BT = jnp.pad(tokens_BT, ((0, 0), (0, T - length))) if kind(name) == "decoder" else tokens_BT
    return logits_of(name, params, rows_BT, backend)[:, :length]


def gradient_of(name, **more):
    """The weighted sum of all tokens' losses, and its gradients: by parameters and a batch of 8 rows."""
    return lambda p, batch: jax.value_and_grad(lambda p: objective(blueprint(name, **more).bind(p), batch))(p)


@functools.cache
def gradient(name, **more):
    return jax.jit(gradient_of(name, **more))


def eight(row):
    """A batch of one row and of 7 that hold nothing."""
    return {k: jnp.pad(jnp.asarray(x)[None], ((0, 7), (0, 0))) for k, x in row.items()}


@functools.cache
def packed(length=T):
    """Eight rows of one document to three, and padding, no two rows alike; weights that make the loss a mean."""
    tokens = np.random.default_rng(0).integers(0, V, (8, length))
    first = np.asarray([2, 3, 4, 5, 6, 8, 10, 12])[:, None]
    segments = 1 + (np.arange(length) >= first) + (np.arange(length) >= 2 * first)
    segments[::3, -2:] = 0
    weights = (segments > 0).astype(np.float32)
    return dict(tokens=tokens, segments=segments, labels=tokens * 7 % V, weights=weights / weights.sum())


THOROUGH = ("llama", "bert")  # a decoder and an encoder in every backend; tests/nn holds each backend to the reference


def with_backend(names):
    """Every family as it is; those of `THOROUGH` in every other backend, too."""
    others = [b for b in BACKENDS if b != "xla"]  # what `auto` is here
    pairs = [(n, b) for n in names for b in (None, *(others if n in THOROUGH else ()))]
    return pytest.mark.parametrize("name, backend", pairs, indirect=["name"], scope="module")


@with_backend(DECODERS)
def test_the_future_cannot_change_the_past(name, params, tokens_BT, backend):
    before = logits_of(name, params, tokens_BT, backend)
    after = logits_of(name, params, tokens_BT.at[:, 7].add(1) % V, backend)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 1e-4, "and it must change every later token"


UNABLE = [("t5", "splash"), ("t5", "triton"), ("gemma", "triton")]


@pytest.mark.parametrize("name, backend", UNABLE, indirect=["name"])
def test_a_backend_that_is_not_able_says_so(name, tokens_BT, backend):
    with pytest.raises(lookup.Mistake, match=f"'{backend}': .*; choose 'xla' or 'chunked'"):
        logits_of(name, fresh(name), tokens_BT, backend)


@with_backend(MODELS)
def test_a_packed_neighbour_changes_nothing(name, params, tokens_BT, backend):
    segments_BT = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3] * 2)
    beside = logits_of(name, params, tokens_BT, backend, segments_BT=segments_BT)
    np.testing.assert_allclose(beside[:, 5:9], alone(name, params, tokens_BT[:, 5:9], backend), atol=1e-5)
    swapped = logits_of(name, params, tokens_BT.at[:, :5].set(3), backend, segments_BT=segments_BT)
    np.testing.assert_array_equal(beside[:, 5:9], swapped[:, 5:9])


@with_backend(MODELS)
def test_a_packed_neighbour_changes_no_gradient(name, params, tokens_BT, backend):
    """The gradient of two packed documents is the sum of each one's own."""
    run = gradient(name, **({"attention": backend} if backend else {}))

    def of(tokens, segments):
        row = {"tokens": np.asarray(tokens), "segments": np.asarray(segments)}
        if kind(name) == "decoder":
            row = clm.features({k: np.append(x, 0) for k, x in row.items()})
        else:  # any label, for every token
            row |= {"labels": row["tokens"] * 7 % V, "weights": (row["segments"] > 0).astype(np.float32)}
        return run(params, eight(row))[1]

    document = np.asarray(tokens_BT[0])
    both = of(document, [1] * 5 + [2] * 7)
    first = of(np.pad(document[:5], (0, 7)), [1] * 5 + [0] * 7)
    second = of(np.pad(document[5:], (0, 5)), [1] * 7 + [0] * 5)
    jax.tree.map(lambda b, x, y: np.testing.assert_allclose(b, x + y, atol=2e-4), both, first, second)


@functools.cache
def with_cache(name):
    return jax.jit(lambda p, t, c: blueprint(name).bind(p)(t, cache=c))


@decoders
def test_one_token_at_a_time_equals_one_pass(name, params, tokens_BT):
    cache, got = blueprint(name).bind(params).empty_cache(2, 16), []
    for at in (slice(0, 5), *(slice(t, t + 1) for t in range(5, T))):
        logits, cache = with_cache(name)(params, tokens_BT[:, at], cache)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), logits_of(name, params, tokens_BT), atol=1e-5)


@decoders
def test_rows_of_different_lengths_decode_as_if_alone(name, params, tokens_BT):
    _, cache = with_cache(name)(params, tokens_BT[:, :5], blueprint(name).bind(params).empty_cache(2, 16))
    cache = dataclasses.replace(cache, lengths_B=jnp.asarray([5, 3]))  # the second row's last two were padding
    logits, _ = with_cache(name)(params, tokens_BT[:, 5:6], cache)
    np.testing.assert_allclose(logits[1], alone(name, params, tokens_BT[:, np.array([0, 1, 2, 5])])[1, -1:], atol=1e-5)


def test_neither_padding_nor_another_row_changes_anything(name, params, tokens_BT):
    same, beside = (logits_of(name, params, x)[0] for x in (tokens_BT[:1].repeat(2, 0), tokens_BT))
    np.testing.assert_allclose(same, beside, atol=1e-5)
    padded = logits_of(name, params, tokens_BT, segments_BT=(jnp.arange(T) < 4).astype(int)[None].repeat(2, 0))
    np.testing.assert_allclose(padded[:, :4], alone(name, params, tokens_BT[:, :4]), atol=1e-5)


@decoders
def test_the_loss_is_that_of_the_logits(name, params, tokens_BT):
    """What is trained and scored chunk by chunk, without the logits, has whatever the family does to them."""
    labels, segments_BT = tokens_BT[0, ::-1], jnp.ones_like(tokens_BT)
    log_probs = jax.nn.log_softmax(logits_of(name, params, tokens_BT, segments_BT=segments_BT)[0])
    row = {"tokens": tokens_BT[0], "labels": labels, "weights": jnp.ones(T), "segments": segments_BT[0]}
    found, _ = gradient(name)(params, eight(row))
    assert found == pytest.approx(-float(log_probs[jnp.arange(T), labels].sum()), rel=1e-5)


STEPS = {"gemma": 120, "rnn": 120}  # of families that take longer than 60 to learn a row by heart


def test_it_overfits_one_batch(name):
    import optax

    tokens = np.random.default_rng(0).integers(0, V, T + 1)
    row = clm.features({"tokens": tokens, "segments": np.ones(T + 1, int)})
    batch = eight(row | {"weights": row["weights"] / T})
    tx = optax.adam(1e-2)

    @jax.jit
    def update(params, opt, grads):
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    params = fresh(name)
    opt, first = tx.init(params), None
    for _ in range(STEPS.get(name, 60)):
        mean, grads = gradient(name)(params, batch)
        params, opt = update(params, opt, grads)
        first = mean if first is None else first
    if name == "t5":  # its paper draws a head of logits around 1
        assert np.log(V) < first < np.log(V) + 1.5
    else:
        assert first == pytest.approx(np.log(V), rel=0.1), "a fresh model guesses uniformly"
    assert mean < 0.1


@pytest.mark.parametrize("name, remat", [*((n, "full") for n in MODELS), ("llama", "dots")], indirect=["name"])
def test_rematerialisation_changes_no_gradient(name, params, remat):
    got, want = (gradient(name, **more)(params, packed())[1] for more in (dict(remat=remat), {}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_dropout_acts_only_with_a_key_and_differs_by_layer_and_key(name, params, tokens_BT):
    run = reader(name, dropout=0.5)
    still, usual = (program.lower(params, tokens_BT, {}).as_text() for program in (run, reader(name)))
    assert still == usual, "without a key it is the program of a model without dropout"
    one, again, other = (run(params, tokens_BT, {"key": jax.random.key(k)}) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_bfloat16_stays_near_float32_and_gives_float32_logits(name, params, tokens_BT):
    rounded = reader(name, dtype="bfloat16")(params, tokens_BT, {})
    exact = logits_of(name, params, tokens_BT)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


MIXED = [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)]
ALONE = [dict(data=8), dict(fsdp=8), dict(fsdp=2, expert=4)]  # `expert` is as `fsdp` to a model that has no experts


def split(name, sizes):
    new = sizes in MIXED or ("expert" in sizes and hasattr(blueprint(name).config, "experts"))
    return pytest.param(name, sizes, marks=() if new else pytest.mark.endurance)


@pytest.mark.parametrize(
    "name, sizes", [split(n, s) for n in MODELS for s in MIXED + ALONE], indirect=["name"], scope="module", ids=str
)
def test_eight_devices_compute_what_one_does(name, params, sizes):
    (want, want_grads), mesh = gradient(name)(params, packed()), axes.mesh(**sizes)
    with axes.on(mesh):
        placed = jax.device_put(params, axes.shardings(params, mesh))
        got, grads = jax.jit(gradient_of(name))(placed, axes.put(packed(), 8, mesh))
    assert got == pytest.approx(float(want), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want_grads)


def test_initial_parameters_do_not_depend_on_the_mesh(name):
    placed = blueprint(name).init(0, axes.mesh(data=2, fsdp=2, tensor=2))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)), "it is split at all"
    assert jax.tree.structure(placed) == jax.tree.structure(fresh(name))
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(fresh(name)), strict=True):
        assert np.array_equal(one, other)


def test_layers_are_drawn_apart(name):
    for path, x in jax.tree_util.tree_leaves_with_path(fresh(name)):
        if "blocks" not in jax.tree_util.keystr(path):
            continue
        assert x.shape[0] == SIZES["layers"]
        if axes.is_matrix(path):
            assert not np.array_equal(x[0], x[1]), jax.tree_util.keystr(path)


def test_a_name_and_a_shape_agree_for_every_parameter(name):
    """One letter, one size, in the whole tree; every parameter has a name that places it."""
    sizes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(blueprint(name).shapes):
        letters = axes.of(axes.name_of(path))
        assert letters, jax.tree_util.keystr(path)
        for letter, size in zip(letters, x.shape[len(x.shape) - len(letters) :]):
            assert sizes.setdefault(letter, size) == size, jax.tree_util.keystr(path)


def test_a_wrong_shape_is_loud(name, params):
    model = blueprint(name).bind(params)
    with pytest.raises(TypeError, match=r"tokens_B[TS]"):
        read(model, jnp.zeros(T, jnp.int32))
    with pytest.raises(TypeError, match="segments_BT has T=3"):
        model.hidden(jnp.zeros((2, T), jnp.int32), segments_BT=jnp.ones((2, 3), jnp.int32))


PUBLISHED = {  # millions of parameters, with the vocabulary of each
    "gpt2": (50257, {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558, "gpt3-175b": 174_600}),
    "llama": (128256, {
        "llama3.1-8b": 8030, "llama3.1-70b": 70_554, "llama3.1-405b": 405_853, "llama3.2-1b": 1236, "llama3.2-3b": 3213,
    }),
    "gemma": (256000, {"gemma2-2b": 2614, "gemma2-9b": 9242, "gemma2-27b": 27_227}),
    "mixtral": (32000, {"8x7b": 46_703, "8x22b": 140_621}),
    "rnn": (10_000, {"lstm-medium": 19.8, "lstm-large": 66.0}),
    "bert": (30522, {"bert-base": 110, "bert-large": 336, "distilbert-base": 67}),
    "modernbert": (50368, {"modernbert-base": 149, "modernbert-large": 395}),
    "t5": (32128, {"t5-small": 60.5, "t5-base": 223, "t5-large": 738, "t5-11b": 11_307, "t5-1.1-xxl": 11_135}),
}  # fmt: skip


def test_presets_have_the_published_number_of_parameters(name):
    module = importlib.import_module(f"jaxlm.models.{name}")
    vocab, published = PUBLISHED.get(name, (100, {}))
    for size in module.SIZES:
        found = Blueprint.of({"name": name, "size": size}, vocab=vocab).size / 1e6
        if size in published:
            assert found == pytest.approx(published[size], rel=0.01), size
    with pytest.raises(lookup.Mistake, match=r"config\.model\.size has no 'huge'"):
        Blueprint.of({"name": name, "size": "huge"}, vocab=vocab)


def test_every_second_layer_of_gpt3_sees_a_band():
    model = Blueprint.of(dict(name="gpt2", layers=2, width=16, heads=4, context=32, window=3), vocab=V)
    wide = Blueprint.of(dict(name="gpt2", layers=2, width=16, heads=4, context=32), vocab=V)
    params = noisy(model)
    tokens_BT = jax.random.randint(jax.random.key(0), (1, 12), 0, V)
    banded, dense = (np.asarray(jax.jit(lambda p, m=m: m.bind(p)(tokens_BT)[0])(params)) for m in (model, wide))
    np.testing.assert_allclose(banded[:, :3], dense[:, :3], atol=1e-5)
    assert np.abs(banded - dense)[:, 3:].max(axis=-1).min() > 1e-3


def test_gpt2_refuses_more_positions_than_it_learned():
    with pytest.raises(lookup.Mistake, match=r"33 positions.*context=32"):
        blueprint("gpt2").bind(fresh("gpt2"))(jnp.zeros((1, 33), jnp.int32))


def test_a_sliding_window_sees_that_many_tokens(tokens_BT):
    model = blueprint("llama", layers=1, window=3)
    params = noisy(model)
    run = jax.jit(lambda t: model.bind(params)(t)[0])
    before, after = run(tokens_BT), run(tokens_BT.at[:, 4].add(1) % V)
    changed = np.flatnonzero(np.abs(before - after).max(axis=(0, 2)))
    assert changed.tolist() == [4, 5, 6]


def test_nnx_modules_hold_no_hidden_state(name):
    """A model is its parameters: nothing else would be saved."""
    module = importlib.import_module(f"jaxlm.models.{name}")
    _, params, rest = nnx.split(module.Model(blueprint(name).config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    assert jax.tree.leaves(params) and not jax.tree.leaves(rest)


def test_flops_count_what_a_token_goes_through():
    c = dict(layers=1, width=4, heads=1, kv_heads=1, head_width=2, mlp_width=8, context=8)
    dense = Blueprint.of(dict(name="llama", **c), vocab=V)
    attention, mlp, norms, head = 4 * 4 * 2, 3 * 4 * 8, 3 * 4, V * 4
    assert dense.flops_per_token(6) == 6 * (attention + mlp + norms + head) + 12 * 2 * 6
    sparse = Blueprint.of(dict(name="mixtral", experts=4, chosen=2, **c), vocab=V)
    assert sparse.flops_per_token(6) == 6 * (attention + 2 * mlp + 4 * 4 + norms + head) + 12 * 2 * 6
    recurrent = Blueprint.of(dict(name="rnn", cell="gru", layers=1, width=4), vocab=V)
    assert recurrent.flops_per_token(6) == 6 * (2 * 3 * 4 * 4 + 3 * 4 + V * 4 + V), "and attention where there is none"


@pytest.mark.parametrize("name", ["gpt2", "gemma", "t5"])
def test_a_program_does_not_grow_with_depth(name, monkeypatch):
    """Off the CPU, or beyond 12 layers; Gemma's repeat every few, and T5 has two stacks."""
    monkeypatch.setattr("jaxlm.nn.stack.IN_A_ROW", 0)
    few, many = (
        jax.jit(lambda params, x, m=m: read(m.bind(params), x)).lower(m.shapes, np.zeros((1, T), np.int32)).as_text()
        for m in (blueprint(name, layers=layers) for layers in (12, 48))
    )
    assert len(many.splitlines()) == len(few.splitlines())
