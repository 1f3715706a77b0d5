"""What transformers writes, we write, token for token: greedy and beams (scripts/make_goldens.py)."""

import json

import pytest

import jaxlm
from jaxlm import convert, marks
from jaxlm.decode.beam import EARLY
from jaxlm.marks import Marks
from tests.golden import GOLDENS, folder_of, golden
from tests.published import with_tokenizer

WRITERS = [name for name in GOLDENS if "written" in golden(name).files]
THEIRS = dict(num_beams="beams", forced_bos_token_id="forced_bos", forced_eos_token_id="forced_eos")
STOPPING = dict(zip((False, True, "never"), EARLY))


@pytest.fixture(scope="module", params=WRITERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def lm(name, tmp_path_factory):
    return jaxlm.load(str(folder_of(name, tmp_path_factory.mktemp("hf") / name)))


def written(name):
    """For each case its prompts, the settings of transformers, and the rows that belong to each prompt."""
    g = golden(name)
    for case, rows_BT in zip(json.loads(str(g["cases"])), g["written"], strict=True):
        each = case["settings"].get("num_return_sequences", 1)
        rows = [[int(token) for token in row if token >= 0] for row in rows_BT[: each * len(case["prompts"])]]
        yield case["prompts"], case["settings"], [rows[at : at + each] for at in range(0, len(rows), each)]


def ours(settings):
    """Keywords of `LM.generate`, and the ids that end a row."""
    how = {THEIRS.get(key, key): value for key, value in settings.items()}
    ends = how.pop("eos_token_id") or []
    how["early_stopping"] = STOPPING[how.get("early_stopping", False)]
    return dict(temperature=0, forced_bos=-1, forced_eos=-1) | how, ends


def test_every_row_is_the_one_of_transformers(name, lm, monkeypatch):
    new = golden(name)["written"].shape[2]
    for prompts, settings, want in written(name):
        how, ends = ours(settings)
        monkeypatch.setattr(lm, "ends", ends)
        got = lm.generate(prompts, max_new_tokens=new, **how)
        assert got == (want if how.get("num_return_sequences", 1) > 1 else [rows[0] for rows in want]), settings


def published(case, folder):
    """A BART's folder that says itself what this case's settings do."""
    folder_of("bart", folder)
    keys = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    (folder / marks.FILE).write_text(json.dumps({key: case[key] for key in keys}))
    return folder


def forced_case():
    """A case of BART in which both ends are forced, and nothing else asked."""
    keys = {"eos_token_id", "forced_bos_token_id", "forced_eos_token_id"}
    return next(case for case in written("bart") if set(case[1]) == keys and case[1]["eos_token_id"])


def test_a_text_begins_and_ends_as_published_unless_told_otherwise(tmp_path):
    prompts, case, want = forced_case()
    lm = jaxlm.load(str(published(case, tmp_path)))
    how = dict(max_new_tokens=12, temperature=0)
    assert lm.generate(prompts, **how) == [rows[0] for rows in want]
    free = lm.generate(prompts, **how, forced_bos=-1, forced_eos=-1)
    assert all(row[:1] != [case["forced_bos_token_id"]] for row in free) and len(free[0]) == 12
    assert lm.generate(prompts, **how, forced_bos=6, forced_eos=-1)[0][0] == 6


def test_what_is_forced_is_kept_in_a_workdir_and_comes_back(tmp_path):
    prompts, case, _ = forced_case()
    folder = with_tokenizer(published(case, tmp_path / "a"))
    convert.main([str(folder), str(tmp_path / "run")])
    convert.main([str(tmp_path / "run"), str(tmp_path / "b")])
    lms = [jaxlm.load(str(tmp_path / place)) for place in ("a", "run", "b")]
    assert all(lm.forced == lms[0].forced and lm.ends == lms[0].ends for lm in lms)
    how = dict(max_new_tokens=12, beams=3, temperature=0)
    assert lms[0].generate(prompts, **how) == lms[1].generate(prompts, **how) == lms[2].generate(prompts, **how)
    said = json.loads((tmp_path / "b" / marks.FILE).read_text())
    assert said["decoder_start_token_id"] == 2, "transformers looks for it here alone, where there is such a file"
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        assert said[key] == case[key]


PAIR = dict(model_type="bart", is_encoder_decoder=True, eos_token_id=2, forced_eos_token_id=2, bos_token_id=0)


@pytest.mark.parametrize(
    "config, generation, found",
    [
        (PAIR, None, Marks([2], dict(eos=2))),
        (PAIR | dict(forced_bos_token_id=0), None, Marks([2], dict(bos=0, eos=2))),
        (PAIR | dict(force_bos_token_to_be_generated=True), None, Marks([2], dict(bos=0, eos=2))),
        (PAIR, dict(forced_bos_token_id=0), Marks([2], dict(bos=0))),  # config.json is not in force
        (PAIR, dict(eos_token_id=[3, 4], forced_eos_token_id=[7, 4]), Marks([3, 4], dict(eos=4))),
        (PAIR | dict(is_encoder_decoder=False), None, Marks([2], {})),
        (dict(model_type="llama"), None, Marks([], {})),
    ],
)
def test_where_the_marks_are_found(config, generation, found, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / marks.FILE).write_text(json.dumps(generation))
    assert marks.read(tmp_path) == found
