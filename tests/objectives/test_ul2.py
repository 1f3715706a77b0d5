"""A mode token says how the text was damaged, and the text can be put together again."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm import objectives
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs
from tests.objectives.texts import BOS, EOS, MODES, SENTINELS, UNKNOWN, WORDS, pack, pairs, restored, text

NAMES = {token: name for name, token in MODES.items()}
documents = st.lists(st.integers(1, 90), min_size=1, max_size=8)


@settings(deadline=None)
@given(documents, st.sampled_from(["encoder-decoder", "decoder"]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_original_is_in_source_and_target_and_one_mode_in_front(lengths, kind, whole, isolate, seed):
    one = objectives.of(dict(name="ul2"), length=64, words=WORDS, kind=kind)
    texts = [text(n, seed + i, bos=whole, eos=whole, unknown=True) for i, n in enumerate(lengths)]
    row = pack(texts, one.row, isolate)
    example = one.features(row, np.random.default_rng(seed))
    bodies = [document.tolist() for document in _pairs.documents(row, WORDS)]
    found = pairs(example)
    assert len({source[0] for source, _ in found}) <= 1
    for source, target in found:
        mode, source = NAMES[source[0]], source[1:]
        body = source[:-1] + target[:-1] if mode == "[S2S]" else restored(source, target)
        assert any(body == b[: len(body)] or body == b[len(b) - len(body) :] for b in bodies)
        if mode == "[S2S]":
            assert not set(SENTINELS) & set(source + target) and len(target) - 1 <= max(1, np.ceil(len(body) / 2))
        else:
            assert not {BOS, EOS, UNKNOWN} & set(target[:-1])


def test_denoisers_are_drawn_by_their_shares_and_have_their_rates():
    one = objectives.of(dict(name="ul2"), length=512, words=WORDS, kind="encoder-decoder")
    row, noise, seen = pack([text(one.row, 1)], one.row), {}, []
    for seed in range(1400):
        ((source, target),) = pairs(one.features(row, np.random.default_rng(seed)))
        seen.append(NAMES[source[0]])
        share = np.isin(target, [*SENTINELS, EOS], invert=True).sum() / one.row
        noise.setdefault(seen[-1], []).append(share)
    for mode, share in {"[NLU]": 2 / 7, "[S2S]": 1 / 7, "[NLG]": 4 / 7}.items():
        assert abs(seen.count(mode) / 1400 - share) < 0.04
    assert set(np.round(noise["[NLU]"], 2)) == {0.15} and set(np.round(noise["[NLG]"], 2)) == {0.15, 0.5}
    assert abs(np.mean(noise["[S2S]"]) - 0.25) < 0.04


def test_wrong_options_are_named_before_training():
    for shares in ([1, 1], [0, 0, 0], [1, -1, 1]):
        with pytest.raises(Mistake, match=r"config\.objective\.shares="):
            objectives.of(dict(name="ul2", shares=shares), length=64, words=WORDS, kind="encoder-decoder")
    with pytest.raises(Mistake, match="has 185 spans, and the tokenizer has 100 sentinels"):
        objectives.of(dict(name="ul2"), length=1000, words=WORDS, kind="encoder-decoder")
