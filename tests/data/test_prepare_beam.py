"""`jaxlm prepare --beam`: many machines make the very store that one process makes."""

import gzip
import json
from pathlib import Path
import random

import numpy as np
import pytest

from jaxlm import prepare as program
from jaxlm.data import encode, sources, store
from jaxlm.data.beam import Beam, _by_file
from jaxlm.data.pipeline import Reading
from jaxlm.data.splits import Splitter
from jaxlm.lookup import Mistake
from jaxlm.prepare import prepare
from tests.test_prepare import contents

pytest.importorskip("apache_beam")
ONE = "--runner=DirectRunner"
SEVERAL = f"{ONE} --direct_num_workers=2 --direct_running_mode=multi_processing"
WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "barks",
    "sleeps",
    "quick",
    "lazy",
    "jumps",
    "over",
    "under",
    "river",
    "house",
    "who",
    "why",
    "not",
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Three compressed files of a hundred documents with duplicates across them, and two of text; in small batches."""
    monkeypatch.setattr(encode, "BATCH", 2_000)
    monkeypatch.setattr(program, "COMMIT", 3_000)
    rng = random.Random(0)
    texts = [f"Document {i}. " + " ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for i in range(240)]
    texts += [text.upper() for text in texts[:30]] + [f"{text} indeed" for text in texts[30:60]]
    rng.shuffle(texts)
    for number in range(3):
        lines = [json.dumps(dict(text=text)) for text in texts[number * 100 : number * 100 + 100]]
        (tmp_path / f"docs{number}.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, "{", ""]).encode()))
    for name in "ab":
        own = [f"Line {name} {i}. " + " ".join(rng.choices(WORDS, k=30)) for i in range(40)]
        (tmp_path / f"{name}.txt").write_text("\n".join([*texts[::9], *own]))
    return dict(docs=f"jsonl:{tmp_path}/docs*.jsonl.gz?on_error=skip", lines=f"text:{tmp_path}/?.txt?documents=line")


HOW = {
    "plain": dict(tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab=340)),
    "everything": dict(
        tokenizer=dict(kind="huggingface", vocab=320),
        clean=["unicode", dict(name="length", min_words=6)],
        dedup=dict(near=0.8),
        augment=[dict(name="eda"), dict(name="noise", rate=0.3, keep=False)],
    ),
    "neighbours": dict(tokenizer=dict(kind="bytes"), split="tail", augment=[dict(name="mix")]),
}


@pytest.mark.parametrize("name", ["plain", "neighbours", pytest.param("everything", marks=pytest.mark.endurance)])
def test_the_store_is_the_one_that_a_single_process_makes(name, corpus, tmp_path):
    how = dict(HOW[name], validation=0.2)
    prepare(f"{tmp_path}/local", corpus, workers=1, **how)
    made = prepare(f"{tmp_path}/beam", corpus, workers=1, beam=SEVERAL if name == "everything" else ONE, **how)
    assert contents(tmp_path / "local") == contents(tmp_path / "beam")
    manifest = made.manifest("docs")
    assert manifest["skipped"] == {"bad JSON": 3} and manifest["splits"]["validation"]["documents"] > 20
    if name == "everything":
        assert min(manifest["duplicates"].values()) > 5 and min(manifest["copies"].values()) > 100


def test_a_source_of_files_is_read_file_by_file_and_another_whole(corpus, tmp_path, monkeypatch):
    shards = []
    run = Beam._run
    monkeypatch.setattr(Beam, "_run", lambda self, some, *rest: shards.append(some) or run(self, some, *rest))
    (tmp_path / "odd[1]?x=y.txt").write_text("odd")
    sources = corpus | dict(odd=f"text:{tmp_path}/odd[1]?x=y.txt?documents=line")
    prepare(f"{tmp_path}/store", sources, dict(kind="bytes"), beam=ONE, validation=0)
    assert [[Path(spec).name for _, spec, _ in some] for some in shards] == [
        [f"docs{i}.jsonl.gz?on_error=skip" for i in range(3)],
        [f"{name}.txt?on_error=raise&documents=line" for name in "ab"],
        ["odd[1]?x=y.txt?on_error=raise&documents=line"],
    ]


def test_what_a_killed_local_run_left_is_written_over(corpus, tmp_path, monkeypatch):
    how = dict(tokenizer=dict(kind="bytes"), dedup=dict(near=None), workers=1)
    prepare(f"{tmp_path}/straight", corpus, **how)

    class Killed(BaseException):
        pass

    def write_and_die(path, content):
        store.write_json(path, content)
        if Path(path).name == "progress.json":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(program, "write_json", write_and_die)
        with pytest.raises(Killed):
            prepare(f"{tmp_path}/killed", corpus, **how)
    prepare(f"{tmp_path}/killed", corpus, beam=ONE, **how)
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")


def test_a_mistake_on_another_machine_comes_through(corpus, tmp_path):
    sources = dict(docs=corpus["docs"].partition("?")[0])
    (tmp_path / "train.txt").write_text("abc")
    prepare(f"{tmp_path}/store", dict(a=f"text:{tmp_path}/train.txt"), dict(kind="characters"), validation=0)
    with pytest.raises(Mistake, match=r"docs0.jsonl.gz, line 101: not JSON: .*on_error=skip"):
        prepare(f"{tmp_path}/store", sources, dict(kind="characters"), beam=ONE, validation=0)


def test_options_without_a_runner_are_a_mistake(corpus, tmp_path):
    with pytest.raises(Mistake, match="names no runner; for example"):
        prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), beam="--direct_num_workers=2")
    with pytest.raises(Mistake, match=r"--runner=NopeRunner': .*Valid values are .*FlinkRunner"):
        prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), beam="--runner=NopeRunner")
    assert not (tmp_path / "store").exists()


def test_the_command_takes_beams_options(corpus, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    prepare = dict(sources={corpus!r}, tokenizer=dict(kind='bytes'))\n"
        f"    return ConfigDict(dict(store='{tmp_path}/store', prepare=prepare))\n"
    )
    program.main([f"--config={config}", f"--beam={ONE}"])
    assert np.all(store.open(f"{tmp_path}/store").split("docs", "train").bytes > 0)


def test_what_is_no_glob_is_read_whole(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    split = Splitter("document", 0.1, 0)
    for spec, want in {"python-docs:": 1, "python-source:": 1, f"text:{tmp_path}/?.txt": 2}.items():
        assert len(_by_file(Reading(spec, sources.find(spec), split))) == want
