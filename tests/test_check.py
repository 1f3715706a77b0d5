"""`jaxlm convert --check`: its comparison against what transformers answered (the goldens), and its words."""

import sys
import types

import einops
import numpy as np
import pytest

import jaxlm
from jaxlm import check, convert
from jaxlm.lookup import Mistake
from tests.golden import folder_of, golden

PROMPT, SIDES, PACKED = "a prompt of 310 tokens", ("padded on the left", "padded on the right"), "packed into one row"
KINDS = {"llama": ["logits"], "bert": ["logits", "hidden", "pooled"], "t5": ["logits", "hidden"]}
SHORT = {(way, key) for way in (*SIDES, PACKED) for key in ("logits", "hidden")} | {("padded on the right", "pooled")}


def recorded(name):
    """transformers' answers as the golden holds them, to the rows that `check` asks for as well."""
    g = golden(name)
    rows = dict(prompt="prompt", first="first", second="second", cached="prompt", exported="prompt")
    return {row: {key: g[f"{which}_{key}"][0] for key in KINDS[name]} for row, which in rows.items()}


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def lm(name, tmp_path_factory):
    return jaxlm.load(str(folder_of(name, tmp_path_factory.mktemp("hf") / name)))


@pytest.fixture(scope="module")
def ours(lm):
    return check.answers(lm, check.rows(lm))


def test_the_rows_are_those_of_the_goldens(name, lm):
    g = golden(name)
    for which, row in check.rows(lm).items():
        for ours, theirs in dict(token_ids="", decoder_ids="_decoder", types="_types").items():
            np.testing.assert_array_equal(row.get(ours), g[which + theirs][0] if which + theirs in g else None)


def test_every_way_to_ask_gives_what_transformers_answered(name, ours):
    found = check.compare(ours, recorded(name))
    want = {(way, key) for way in (PROMPT, "exported") for key in KINDS[name]}
    want |= {(way, key) for way, key in SHORT if key in KINDS[name]}
    want |= set() if name == "bert" else {("cached", "logits")}
    assert found.keys() == want and max(found.values()) < check.TOLERANCE


def test_a_number_that_differs_is_told_wherever_it_is_asked_for(name, ours):
    for key in KINDS[name]:
        for row, ways in dict(prompt={(PROMPT, key)}, second=SHORT, exported={("exported", key)}).items():
            for amiss in (1e-3, np.nan):
                want = recorded(name)
                want[row][key].flat[-1] += amiss
                found = check.compare(ours, want)
                told = {asked: x for asked, x in found.items() if not x < check.TOLERANCE}
                assert told.keys() == {(way, what) for way, what in ways if what == key}
                np.testing.assert_allclose([*told.values()], amiss, rtol=0.1)


@pytest.mark.parametrize("difference, status", [(9e-5, 0), (2e-4, 1), (float("nan"), 1), (2.0, 1)])
def test_the_command_prints_each_difference_and_fails_beyond_the_tolerance(
    difference, status, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(check, "check", lambda _: {(PROMPT, "logits"): 1e-6, (PACKED, "hidden"): difference})
    assert convert.main(["--check", str(folder_of("llama", tmp_path / "a"))]) == status
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "1.0e-06 of 0.0001  a prompt of 310 tokens: logits"
    assert told[1].startswith(f"{difference:.1e} of 0.0001  packed into one row: hidden")
    assert told[1].endswith("TOO MUCH") == status


def test_what_has_to_be_installed_is_told_before_the_weights_are_read(tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "a")
    (folder / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Mistake, match="pip install torch transformers"):
        convert.main(["--check", str(folder)])


def test_a_class_that_transformers_does_not_have_is_a_mistake(tmp_path, monkeypatch):
    quiet = types.SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    einops.rearrange(np.zeros(1), "D -> D")  # at its first array einops looks into torch, if there is one
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="4.0", logging=quiet))
    with pytest.raises(Mistake, match=r"transformers 4.0 has no Qwen3ForCausalLM"):
        convert.main(["--check", str(folder_of("qwen3", tmp_path / "a"))])


def test_a_folder_that_is_none_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match="is no Hugging Face folder"):
        convert.main(["--check", str(tmp_path)])
