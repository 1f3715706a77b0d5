"""The measure of span corruption asks all for the same tokens, and adds up to the objective's loss."""

import numpy as np

from jaxlm import config, prepare, train
from jaxlm.lookup import spend
from scripts import span_baseline
from tests.runs import write_corpus


def test_a_text_and_its_gaps_are_found_in_a_pair():
    text, number = span_baseline.gaps([1, 5, 90, 6, 91, 3], [90, 7, 8, 91, 9, 3], [90, 91])
    assert text.tolist() == [1, 5, 7, 8, 6, 9] and number.tolist() == [0, 0, 1, 1, 0, 2]


def test_what_t5_is_measured_by_is_its_loss_on_the_same_examples(tmp_path):
    c = config.load("configs/pretrain/t5_brown.py:tiny").to_dict() | {"store": str(tmp_path / "store")}
    sources = dict(brown=write_corpus(tmp_path)["prose"])
    spend("config.prepare", prepare.prepare, c["prepare"] | dict(sources=sources, workers=1), c["store"])
    found = spend("config", train.train, c | {"mesh": dict(data=1)}, str(tmp_path / "run"))
    measured = span_baseline.measure(str(tmp_path / "run"), rate=c["objective"]["rate"])
    nats = (measured["t5"] + measured["ends"]) * measured["tokens"]
    documents = nats / found["loss"] - measured["tokens"] - measured["gaps"]  # a sentinel for each gap, and their eos
    assert round(documents) > 5 and abs(documents - round(documents)) < 0.01
    assert measured["t5, told"] < measured["t5"]
    assert 0 < measured["5-gram, either way"] < measured["5-gram"] + np.log(2)
