"""A prefix is read both ways, what follows it one way, and neither sees another document."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoint, lm
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.decode.engine import Engine
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn.attention import BACKENDS, KERNELS, attend
from jaxlm.nn.mask import Mask
from jaxlm.objectives import _pairs, prefix
from tests.objectives.texts import EOS, WORDS, pack, pairs, text
from tests.test_models import DECODERS, blueprint
from tests.trees import noisy

documents = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(deadline=None)
@given(documents, st.booleans(), st.booleans(), st.integers(0, 99))
def test_source_and_target_are_the_two_parts_of_each_document(lengths, whole, isolate, seed):
    length = 64
    row = pack([text(n, seed + i, bos=whole, eos=whole) for i, n in enumerate(lengths)], length, isolate)
    example = prefix.features(row, np.random.default_rng(seed), WORDS, length)
    bodies = [document.tolist() for document in _pairs.documents(row, WORDS)]
    found = pairs(example)
    for source, target in found:
        body = source[:-1] + target[:-1]
        assert len(source) > 1 and len(target) > 1 and source[-1] == target[-1] == EOS
        assert any(body == b[: len(body)] or body == b[len(b) - len(body) :] for b in bodies)
    if whole and isolate:
        cut = int(row["tokens"][row["segments"] > 0][-1] != EOS)
        assert len(found) >= len([b for b in bodies if len(b) > 1]) - cut
        assert (
            sum(len(source + target) - 2 for source, target in found) >= sum(len(b) for b in bodies if len(b) > 1) - 1
        )


@given(documents, st.integers(0, 99))
def test_a_decoder_reads_the_row_as_it_is_and_is_not_asked_for_what_it_sees(lengths, seed):
    row = pack([text(n, seed + i, bos=True, eos=True) for i, n in enumerate(lengths)], 65)
    example = prefix.features(row, np.random.default_rng(seed), WORDS, 64, kind="decoder")
    np.testing.assert_array_equal(example["tokens"], row["tokens"][:-1])
    for segment in range(1, row["segments"].max() + 1):
        here = np.flatnonzero(row["segments"] == segment)
        known = np.append(example["prefix"], 0)[here]
        length = known.sum()
        assert known[:length].all() and (length < len(here))
        assert length or len(here) == 1
        asked = [t for t in here[:-1] if example["weights"][t]]
        assert asked == here[max(length - 1, 0) : -1].tolist()
    assert not example["prefix"][example["segments"] == 0].any()


def test_every_length_of_the_prefix_is_as_likely():
    row = pack([text(6)], 6)
    cuts = [len(pairs(prefix.features(row, np.random.default_rng(i), WORDS, 6))[0][0]) - 1 for i in range(3000)]
    np.testing.assert_allclose(np.bincount(cuts)[1:] / 3000, 1 / 5, atol=0.03)


# Attention

T = 130
SEGMENTS = np.array([[1] * 50 + [2] * 60 + [0] * 20, [1] * 130])
PREFIX = np.array([[1] * 20 + [0] * 30 + [1] * 40 + [0] * 40, [1] * 70 + [0] * 60])
known = dict(prefix_BT=jnp.asarray(PREFIX))
MASKS = {
    "prefix": Mask(**known),
    "segments": Mask(**known, segments_BT=jnp.asarray(SEGMENTS)),
    "window": Mask(**known, segments_BT=jnp.asarray(SEGMENTS), window=9),
}


@functools.cache
def inputs():
    return [jax.random.normal(jax.random.key(i), (2, n, T, 8)) for i, n in enumerate((4, 2, 2))]


def by_hand(q, k, v, mask):
    out = np.zeros(q.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, n, t in np.ndindex(q.shape[:3]):
        see = [
            s for s in range(T)
            if (s <= t or PREFIX[b, s]) and (mask.window is None or abs(t - s) < mask.window)
            and (mask.segments_BT is None or SEGMENTS[b, t] == SEGMENTS[b, s])
        ]  # fmt: skip
        score = q[b, n, t] @ k[b, n // 2, see].T / np.sqrt(8)
        weight = np.exp(score - score.max())
        out[b, n, t] = weight / weight.sum() @ v[b, n // 2, see]
    return out


@functools.cache
def answer(mask):
    return by_hand(*inputs(), MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in KERNELS])
def test_a_backend_agrees_with_numpy(backend, mask):
    got = jax.jit(lambda *qkv: attend(*qkv, MASKS[mask], backend))(*inputs())
    np.testing.assert_allclose(got, answer(mask), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_that_has_no_prefix_says_so_and_auto_takes_another(backend):
    with pytest.raises(Mistake, match=f"'{backend}': it has no prefix.*; choose 'xla' or 'chunked'"):
        attend(*inputs(), MASKS["prefix"], backend)


# Models


@functools.cache
def reader(name):
    model = blueprint(name)
    run = jax.jit(lambda p, t, segments, known: model.bind(p)(t, segments_BT=segments, prefix_BT=known)[0])
    return functools.partial(run, noisy(model))


def logits(name, tokens, segments, known):
    return np.asarray(reader(name)(tokens, segments, known))


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "rnn"])
def test_the_suffix_cannot_change_the_past_and_the_prefix_is_read_both_ways(name):
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 32)
    segments, known = jnp.asarray([[1] * 7 + [2] * 5]), jnp.asarray([[1] * 4 + [0] * 3 + [1] * 2 + [0] * 3])
    before = logits(name, tokens, segments, known)
    changed = lambda at: np.abs(logits(name, tokens.at[:, at].add(1) % 32, segments, known) - before).max((0, 2)) > 1e-5  # noqa: E731
    assert changed(3).tolist() == [True] * 7 + [False] * 5, "a token of the prefix, for all of its document"
    assert changed(5).tolist() == [False] * 5 + [True] * 2 + [False] * 5, "a later one, for those behind it"
    assert changed(8).tolist() == [False] * 7 + [True] * 5
    assert (before == logits(name, tokens.at[:, 7:].set(3), segments, known))[:, :7].all()


def test_a_model_that_reads_one_way_refuses():
    with pytest.raises(Mistake, match="rnn: it reads one way"):
        logits("rnn", jnp.zeros((1, 4), int), None, jnp.ones((1, 4), int))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_prompt_is_read_as_a_prefix_is(name):
    """Greedy tokens of the engine are those of one pass over the row with the prompt as its prefix."""
    model = blueprint(name)
    params = noisy(model)
    prompts = [*np.random.default_rng(0).integers(0, 32, (8, 9)).tolist(), [4, 8]]
    rows = Engine(model, params, both_ways=True).generate(prompts, Sampling(temperature=0), max_new_tokens=5)
    for prompt, new in zip(prompts, rows):
        tokens, known = jnp.asarray([prompt + new]), jnp.asarray([[1] * len(prompt) + [0] * len(new)])
        best = logits(name, tokens, None, known)[0].argmax(-1)
        assert best[len(prompt) - 1 : -1].tolist() == new
    plain = Engine(model, params).generate(prompts, Sampling(temperature=0), max_new_tokens=5)
    assert plain != rows


def test_the_objective_of_a_workdir_says_how_its_prompts_are_read(tmp_path):
    tokenizer, section = (
        tokenizers.train([], dict(kind="bytes")),
        dict(name="gpt2", layers=1, width=8, heads=2, context=64),
    )
    tokenizer.save(tmp_path / "tokenizer")
    params = Blueprint.of(section, vocab=tokenizer.vocab).init(0)
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, dict(params=params))
    for objective in ("prefix", "clm"):
        configs.write(dict(model=section, length=16, dtype="float32", objective=dict(name=objective)), str(tmp_path))
        assert lm.load(str(tmp_path)).engine.both_ways == (objective == "prefix")
