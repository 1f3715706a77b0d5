"""Beam search against a search of all continuations, and against the same rule written with lists."""

import itertools

import jax
import numpy as np
import pytest

from jaxlm.decode.beam import BeamSearch
from jaxlm.decode.engine import Engine
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn import native
from tests.trees import noisy

V, CONTEXT, NEW, STOP = 5, 32, 4, 3
PROMPTS = [[1, 2, 0], [4]]


@pytest.fixture(scope="module")
def engine():
    model = Blueprint.of(
        dict(name="llama", layers=1, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, context=CONTEXT), vocab=V
    )
    return Engine(model, noisy(model, std=0.6))


@pytest.fixture(scope="module")
def search(engine):
    return BeamSearch(engine)


@pytest.fixture(scope="module")
def log_probs(engine):
    """Log-probabilities [V] of the token after a row, in one pass over it."""
    forward = jax.jit(lambda tokens_BT: jax.nn.log_softmax(engine.blueprint.bind(engine.params)(tokens_BT)[0]))
    known = {}

    def after(row):
        if tuple(row) not in known:
            known[tuple(row)] = np.asarray(forward(np.pad(np.array([row]), ((0, 0), (0, CONTEXT - len(row))))))[
                0, len(row) - 1
            ]
        return known[tuple(row)]

    return after


def check(found, expected):
    assert [one.tokens for one in found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([one.score for one in found], [score for score, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_search_wide_enough_finds_what_trying_everything_finds(search, log_probs, penalty):
    for prompt, found in zip(PROMPTS, search(
        PROMPTS, beams=500, max_new_tokens=NEW, stop=[STOP], length_penalty=penalty, early_stopping="never"
    )):  # fmt: skip
        every = []
        for length in range(1, NEW + 1):
            for new in itertools.product(range(V), repeat=length):
                if STOP not in new[:-1] and (new[-1] == STOP or length == NEW):
                    total = sum(log_probs([*prompt, *new[:i]])[token] for i, token in enumerate(new))
                    every.append((total / length**penalty, [token for token in new if token != STOP]))
        every.sort(reverse=True)
        assert len(found) == len(every) == 1 + 4 + 16 + 64 * 5
        check(found[:8], every[:8])


def by_lists(log_probs, prompt, beams, penalty, early):
    """The same rule in plain Python."""
    growing, finished = [(0.0, [])], []
    for length in range(1, NEW + 1):
        pairs = [(total + p, [*new, t]) for total, new in growing for t, p in enumerate(log_probs(prompt + new))]
        pairs = sorted(pairs, reverse=True)[: 2 * beams]
        ends = [length == NEW or new[-1] == STOP for _, new in pairs]
        finished += [(total / length**penalty, new) for (total, new), end in list(zip(pairs, ends))[:beams] if end]
        finished = sorted(finished, reverse=True)[:beams]
        growing = [pair for pair, end in zip(pairs, ends) if not end][:beams]
        if len(finished) == beams:
            best = (
                growing[0][0] / (NEW if early == "never" and penalty > 0 else length) ** penalty if growing else -np.inf
            )
            if early == "full" or best <= finished[-1][0]:
                break
    return [(score, [t for t in new if t != STOP]) for score, new in finished]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("early", ["best", "full", "never"])
def test_rows_are_kept_ended_and_ranked_by_the_rule(search, log_probs, early, penalty):
    found = search(PROMPTS, beams=3, max_new_tokens=NEW, stop=[STOP], length_penalty=penalty, early_stopping=early)
    for prompt, row in zip(PROMPTS, found):
        check(row, by_lists(log_probs, prompt, 3, penalty, early))


def test_one_beam_is_greedy(engine, search):
    greedy = engine.generate(PROMPTS, Sampling(temperature=0), max_new_tokens=12, stop=[STOP])
    assert [
        row[0].tokens for row in search(PROMPTS, beams=1, max_new_tokens=12, stop=[STOP], early_stopping="full")
    ] == greedy


def test_a_prompt_is_searched_the_same_alone_and_among_others(search):
    both = search(PROMPTS, beams=3, max_new_tokens=8, stop=[STOP])
    for prompt, row in zip(PROMPTS, both):
        check(search([prompt], beams=3, max_new_tokens=8, stop=[STOP])[0], [(one.score, one.tokens) for one in row])


def test_constraints_hold_in_every_row(search):
    for row in search(
        PROMPTS, beams=4, max_new_tokens=10, stop=[STOP], how=Sampling(no_repeat_ngram_size=2, min_new_tokens=3)
    ):
        for one in row:
            pairs = list(zip(one.tokens, one.tokens[1:]))
            assert len(one.tokens) >= 3 and len(pairs) == len(set(pairs))


def test_forced_tokens_begin_and_end_every_row(search, log_probs):
    """And cost nothing: the score is that of the tokens that were chosen."""
    how = Sampling(forced_bos=2, forced_eos=1)
    for prompt, found in zip(PROMPTS, search(PROMPTS, beams=30, max_new_tokens=NEW, early_stopping="never", how=how)):
        every = []
        for middle in itertools.product(range(V), repeat=NEW - 2):
            row = [*prompt, 2, *middle]
            every.append((sum(log_probs(row[: -i or None])[t] for i, t in zip((2, 1), middle)) / NEW, [2, *middle, 1]))
        check(found, sorted(every, reverse=True))


def test_no_option_compiles_the_search_anew(search):
    how = dict(beams=3, max_new_tokens=NEW, stop=[STOP])
    search(PROMPTS, **how)
    before = search._search._cache_size()
    for early, penalty, options in [("full", 2.0, dict(forced_bos=1)), ("never", -0.5, dict(forced_eos=2))]:
        constraints = Sampling(repetition_penalty=1.3, min_new_tokens=2, no_repeat_ngram_size=2, **options)
        search(PROMPTS, early_stopping=early, length_penalty=penalty, how=constraints, **how)
    assert search._search._cache_size() == before


def test_where_fewer_rows_than_beams_can_be_no_more_are_found(search):
    [found] = search(PROMPTS[:1], beams=12, max_new_tokens=1, stop=[STOP])
    assert sorted(one.tokens for one in found) == [[], [0], [1], [2], [4]]


def test_rows_that_the_context_cuts_off_leave_the_others_theirs(search):
    prompts = [[1] * (CONTEXT - 2), [4], [1, 2] * 14]
    together = search(prompts, beams=3, max_new_tokens=12, stop=[STOP], early_stopping="never")
    for prompt, found in zip(prompts, together):
        assert max(len(one.tokens) for one in found) <= CONTEXT - len(prompt)
        alone = search([prompt], beams=3, max_new_tokens=12, stop=[STOP], early_stopping="never")[0]
        check(found, [(one.score, one.tokens) for one in alone])


def test_a_score_counts_what_the_model_gives_to_ids_that_no_token_has(engine, log_probs):
    """Its rows are embedded though the tokenizer ends before them, as in T5."""
    narrow = BeamSearch(Engine(engine.blueprint, engine.params, V - 1))
    [[best, *_]] = narrow([[1, 2, 0]], beams=2, max_new_tokens=NEW, early_stopping="never")
    assert V - 1 not in best.tokens
    total = sum(log_probs([1, 2, 0, *best.tokens[:i]])[token] for i, token in enumerate(best.tokens))
    assert best.score == pytest.approx(total / NEW, rel=1e-5)


def test_a_search_that_makes_no_sense_is_a_mistake(search):
    with pytest.raises(Mistake, match="beams=0"):
        search(PROMPTS, beams=0, max_new_tokens=2)
    for penalty in (300, -300, float("nan")):  # a power of a length that is no number any more ranks nothing
        with pytest.raises(Mistake, match=r"length_penalty=.* is outside -10 to 10"):
            search(PROMPTS, beams=2, max_new_tokens=2, length_penalty=penalty)
    with pytest.raises(Mistake, match="did you mean 'never'"):
        search(PROMPTS, beams=2, max_new_tokens=2, early_stopping="nevr")
    with pytest.raises(Mistake, match=r"leave no token to add; loosen .*no_repeat_ngram_size=1"):
        search(PROMPTS, beams=2, max_new_tokens=12, how=Sampling(no_repeat_ngram_size=1))


def test_rows_of_a_bfloat16_cache_go_with_their_beams():
    """What a beam scores is what one pass over its row gives."""
    model = Blueprint.of(
        dict(name="llama", layers=2, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16, context=CONTEXT),
        vocab=V, dtype="bfloat16",
    )  # fmt: skip
    engine, prompts, new = Engine(model, noisy(model, std=0.4)), [[1, 2, 0], [4, 0, 3]], 12
    assert engine.start(prompts, new)[0].cache.halved == native.ready()
    for prompt, found in zip(prompts, BeamSearch(engine)(prompts, beams=4, max_new_tokens=new, length_penalty=0.0)):
        rows_BT = np.array([[*prompt, *one.tokens] for one in found])
        logits_BTV = np.asarray(jax.jit(model.bind(engine.params))(rows_BT)[0], np.float64)
        log_probs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
        chosen_BT = np.take_along_axis(log_probs_BTV[:, 2:-1], rows_BT[:, 3:, None], -1)[..., 0]
        np.testing.assert_allclose([one.score for one in found], chosen_BT.sum(1), atol=0.05)
