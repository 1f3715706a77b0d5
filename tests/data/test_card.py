"""The data card tells the truth about a store, whatever its manifests say, and is complete in itself."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import card, store, tokenizers
from tests.test_report import HOSTILE, Page


@pytest.fixture
def made(tmp_path):
    """A store of two sources, one with counts of every kind in its manifest."""
    tokenizer = tokenizers.train([], dict(kind="bytes"))
    tokenizer.save(tmp_path / "tokenizer")
    for name, texts in dict(prose=["short", "x" * 5_000, "<b>bold</b>"], code=["def f(): pass"]).items():
        writer = store.Writer(f"{tmp_path}/{name}", "uint16")
        ids = [np.array(tokenizer.encode(text), np.uint16) for text in texts]
        lengths = np.array([len(one) for one in ids])
        writer.append("train", np.concatenate(ids), lengths, lengths)
        more = dict(
            source=f"jsonl:{name}.jsonl", licence="CC0", cut=1, skipped={"bad JSON": 1_234},
            cleaning={"length": {"dropped": 17, "reasons": {HOSTILE: 17}}},
            clean=["gopher", {"name": "length", "least": 5}],
            duplicates=dict(exact=42, near=0), decontaminate=None,
        )  # fmt: skip
        manifest = dict(splits=writer.commit(), vocab=259) | (more if name == "prose" else {})
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    return store.open(str(tmp_path))


def test_it_shows_counts_lengths_sources_rules_duplicates_and_examples(made):
    page = Page(Path(card.write(made)).read_text("utf-8"))
    for part in ("code, prose", "5,016", "jsonl:prose.jsonl", "licence: CC0", "bad JSON", "1,234", "cleaning", "17",
                 "gopher", "least", "duplicates", "exact", "42", "<b>bold</b>", "def f(): pass", "…"):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("svg") == 4 and "decontaminate" not in page.text


def test_it_is_complete_in_itself_and_nothing_in_it_runs(made):
    page = Page(Path(card.write(made)).read_text("utf-8"))
    assert not {"script", "link", "img", "iframe", "a"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href") and not str(value).startswith("#")]


def test_a_card_that_says_the_same_is_left_alone_and_another_replaced(made):
    path = card.write(made)
    before = Path(path).read_bytes()
    stamp = os.stat(path).st_mtime_ns
    card.write(made)
    assert os.stat(path).st_mtime_ns == stamp
    Path(path).write_bytes(b"old")
    assert Path(card.write(made)).read_bytes() == before


def test_lengths_of_all_documents_are_in_the_histogram():
    for lengths in ([1], [2, 2, 2], [1, 10, 100_000], list(range(1, 500))):
        edges, documents, tokens = card.histogram(np.array(lengths))
        assert documents.sum() == len(lengths) and tokens.sum() == sum(lengths) and (np.diff(edges) > 0).all()
