"""Every config runs two steps in its `:tiny` form, from text to samples; a new file joins by being there."""

import inspect
import json
from pathlib import Path

import pytest

from jaxlm import config, evaluate, prepare, train
from jaxlm.lookup import Mistake, spend
from tests.runs import write_corpus

CONFIGS = sorted(Path("configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_prepares_trains_evaluates_and_samples(path, tmp_path):
    c = config.load(f"{path}:tiny")
    text = write_corpus(tmp_path)["prose"]
    keys = c.to_dict() | {"store": str(tmp_path / "store")}
    section = keys["prepare"] | {"sources": dict.fromkeys(keys["prepare"]["sources"], text), "workers": 1}
    if section["tokenizer"]["kind"] == "sentencepiece":
        section["tokenizer"] |= {"vocab": 280 + len(section["tokenizer"].get("extra", ()))}
    spend("config.prepare", prepare.prepare, section, keys["store"])
    found = spend("config", train.train, keys | {"mesh": dict(data=1)}, str(tmp_path / "run"))
    assert 0 < found.get("bits_per_byte", found["loss"]) < 20  # nats per token, where noise makes it no likelihood
    assert keys["steps"] == 2 and config.load(str(path)).steps > 2
    if "samples" in keys:  # an encoder writes no text
        samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
        assert [s["prompt"] for s in samples] == list(keys["samples"]["prompts"])
    if path.stem in ("bert_brown", "t5_brown"):  # what predicts no text from the left is measured by its objective
        evaluate.main([f"--workdir={tmp_path}/run", f"--json={tmp_path}/found.json", f"--batch={keys['batch']}"])
        (again,) = json.loads((tmp_path / "found.json").read_text())["results"].values()
        assert again.pop("nats") / again.pop("tokens") == pytest.approx(found["loss"])
        assert again == pytest.approx({key: found[key] for key in again}) and again.keys() > {"loss", "accuracy"}
        with pytest.raises(Mistake, match="give --data=store:PATH"):
            evaluate.main([f"--workdir={tmp_path}/run", f"--data={text}"])
        with pytest.raises(Mistake, match="--context and --stride are for decoders"):
            evaluate.main([f"--workdir={tmp_path}/run", "--stride=8"])


def test_every_key_of_a_config_is_one_that_training_takes():
    takes = set(inspect.signature(train.train).parameters) - {"workdir"}
    assert takes == set(config.KEYS) - {"distributed"}
