"""Augmentation: further training texts as a function of (seed, text), and validation untouched."""

import json
import pickle

import numpy as np
import pytest

from jaxlm import checkpoint, lookup
from jaxlm import config as configs
from jaxlm import prepare as program
from jaxlm.data import augmentation, encode, store, tokenizers
from jaxlm.data.augmentation import Augmentation, sentences, words
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.prepare import prepare
from tests.test_prepare import Killed, contents, read
from tests.trees import noisy

TEXT = "The quick brown fox jumps over a dog.  It was sad, and the dog slept!\n\n\tA fox is quick? (Yes.)\nso it is"
TEXTS = [f"{TEXT} {i}" for i in range(40)]


@pytest.fixture
def synonyms(tmp_path):
    (tmp_path / "synonyms.csv").write_text("sad, unhappy, sorrowful\nquick\tfast\nalone\n")
    return f"{tmp_path}/synonyms.csv"


def backwards(workdir):
    """Stands in for a model: copy i of a sentence is it, said backwards, and the number i; it cannot read `A...`."""

    def write(texts, copies, *, beams, max_new_tokens):
        return [[] if t[0] == "A" else [f"{workdir}{t[::-1]}{i}" for i in range(copies)] for t in texts]

    return write


RULES = dict(
    eda=dict(),
    noise=dict(rate=0.3),
    mix=dict(),
    translate=dict(there="", back=""),
    paraphrase=dict(model=""),
)


def test_every_kind_is_tested():
    assert sorted(RULES) == lookup.names(augmentation.__name__)


@pytest.mark.parametrize("kind", RULES)
def test_a_copy_is_a_function_of_seed_and_text(kind):
    spec = dict(RULES[kind], name=kind, copies=2)
    made, counts = Augmentation([spec], backwards)(TEXTS)
    assert made == pickle.loads(pickle.dumps(Augmentation([spec], backwards)))(TEXTS)[0]
    assert counts[kind] == len(made) - len(TEXTS) > len(TEXTS) / 2
    if kind in ("eda", "noise"):  # wherever it stands, and whatever stands beside it
        assert [text for t in TEXTS[::-1] for text in Augmentation([spec])([t])[0][::-1]] == made[::-1]
        assert made != Augmentation([dict(spec, seed=1)])(TEXTS)[0]


@pytest.mark.parametrize("kind", RULES)
def test_copies_stand_beside_the_original_or_in_its_place(kind):
    spec = dict(RULES[kind], name=kind, copies=2)
    beside, _ = Augmentation([spec], backwards)(TEXTS)
    instead, _ = Augmentation([dict(spec, keep=False)], backwards)(TEXTS)
    assert [text for text in beside if text in TEXTS] == TEXTS
    assert instead == [text for text in beside if text not in TEXTS] and len(set(instead)) == len(instead)


def test_rules_work_on_the_original_one_after_the_other():
    specs = [dict(name="noise", rate=0.5), dict(name="noise", rate=0.5), dict(name="eda", copies=2)]
    made, counts = Augmentation(specs)([TEXT])
    assert made[0] == TEXT and len(set(made)) == 5 and counts == dict(noise=2, eda=2)
    alone = [Augmentation([dict(specs[0], rate=0)] * nth + [specs[nth]])([TEXT])[0][1:] for nth in range(3)]
    assert [text for texts in alone for text in texts] == made[1:]


@pytest.mark.parametrize("text", ["", "word", " \n ", "a.b", "?!... x", "。", TEXT])
@pytest.mark.parametrize("kind", RULES)
def test_any_text_can_be_augmented_and_what_nothing_came_of_stays(kind, text):
    spec = dict(RULES[kind], name=kind, copies=3, keep=False)
    made, _ = Augmentation([spec], backwards)([text])
    assert made and all(new.strip() for new in made if new != text)
    assert "".join(sentences(text)) == text and augmentation.joined(*words(text)) == text


def test_sentences_end_with_their_blanks_and_take_linear_time():
    assert sentences('One. "Two!" three? \n\n four\n') == ["One. ", '"Two!" ', "three? ", "\n\n ", "four\n"]
    assert len(sentences("." * 1_000_000 + " " * 1_000_000)) == 2 - 1


@pytest.mark.parametrize("kind", ["key", "transpose", "drop", "repeat", "case", "space", "word"])
def test_noise_touches_about_its_share_of_the_words_and_nothing_else(kind):
    text = "\n".join(f"sentence number  {'abcdefghij'[i % 10] * 2}xyz \tof many" for i in range(400))
    (made,), _ = Augmentation([dict(name="noise", rate=0.1, kinds=[kind], keep=False)])([text])
    lines = list(zip(text.split("\n"), made.split("\n")))
    changed = sum(a != b for a, b in lines)
    assert len(lines) == 400 and 0.25 < changed / 400 < 0.55  # 1 - 0.9 ** 5 = 0.41
    lengths = dict(key=0, transpose=0, drop=-1, repeat=1, case=0).get(kind)
    if lengths is not None:
        for a, b in zip(text.split(), made.split()):
            assert a == b or len(b) - len(a) == lengths or kind == "transpose"
    if kind == "case":
        assert made.lower() == text


def test_eda_does_what_the_paper_says(synonyms):
    def made(operation, alpha=0.2, text="a sad dog barks at Quick, quiet cats today often"):
        spec = dict(name="eda", synonyms=synonyms, operations=[operation], alpha=alpha, copies=30)
        return Augmentation([spec])([text])[0][1:]

    original = ["a", "sad", "dog", "barks", "at", "Quick,", "quiet", "cats", "today", "often"]
    replaced = [[(a, b) for a, b in zip(original, new.split()) if a != b] for new in made("replace", 0.1)]
    assert {pair for pairs in replaced for pair in pairs} == {
        ("sad", "unhappy"), ("sad", "sorrowful"), ("Quick,", "Fast,"),
    }  # fmt: skip
    assert all(len(pairs) == 1 for pairs in replaced)
    for new in made("swap"):
        assert sorted(new.split()) == sorted(original)
    for new in made("insert"):
        assert len(new.split()) == 12 and set(new.split()) - set(original) <= {"unhappy", "sorrowful", "fast"}
    sizes = [len(new.split()) for new in made("delete", 0.3)]
    assert 5 < np.mean(sizes) < 9 and min(sizes) > 0


def test_mixing_joins_two_texts_or_takes_their_sentences_by_turns():
    a, b = "A one. A two. A three", "B one.\nB two.\n"
    (_, ab, *_), _ = Augmentation([dict(name="mix", copies=9)])([a, b])
    (_, by_turns, *_), _ = Augmentation([dict(name="mix", copies=9, how="interleave")])([a, b])
    assert ab == f"{a}\n\n{b}" and by_turns == "A one. B one.\nA two. B two.\nA three"


def test_models_write_sentence_by_sentence_and_what_they_cannot_stays():
    text = "One two.  three\n\nA b.\n"
    made, _ = Augmentation([dict(name="paraphrase", model="<", copies=2, prefix="p:")], backwards)([text])
    assert made == [text, "<.owt enO:p0  <eerht:p0\n\nA b.\n".replace("A b.", "<.b A:p0"), made[2]]
    assert made[2].startswith("<.owt enO:p1  ")
    made, _ = Augmentation([dict(name="translate", there="<", back=">", copies=2)], backwards)([text])
    assert made == [text, *(f">0One two.<{i}  >0three<{i}\n\nA b.\n" for i in range(2))]


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(copies=1), r"augment\[0\] needs a name, one of: eda, mix, noise"),
        (dict(name="edda"), "has no 'edda'; did you mean 'eda'"),
        (dict(name="eda", alhpa=1), "has no 'alhpa'; did you mean 'alpha'"),
        (dict(name="eda", alpha=2), "eda: alpha=2 is a share"),
        (dict(name="eda", operations=["insert"]), "'insert' needs synonyms=FILE"),
        (dict(name="eda", operations=["inserts"]), "did you mean 'insert'"),
        (dict(name="eda", synonyms="no/such.csv"), "no file matches 'no/such.csv'"),
        (dict(name="noise", copies=0), "copies=0 is a number from 1 up"),
        (dict(name="noise", kinds=["typo"]), "noise: kinds has no 'typo'"),
        (dict(name="mix", how="add"), "mix: how has no 'add'"),
        (dict(name="translate", there="x"), "needs 'back'"),
        (dict(name="paraphrase", model="x", load=1), "has no 'load'"),
        (dict(name="paraphrase", model="x", copies=3, beams=2), "beams=2 find no 3 copies"),
    ],
)
def test_a_rule_that_cannot_be_is_a_mistake(spec, message):
    with pytest.raises(Mistake, match=message):
        Augmentation([spec], backwards)


def test_a_workdir_that_does_not_write_is_a_mistake_before_anything_is_made(tmp_path):
    with pytest.raises(Mistake, match="is no workdir"):
        prepare(
            f"{tmp_path}/store",
            dict(docs="python-docs:"),
            {},
            augment=[dict(name="paraphrase", model=f"{tmp_path}/none")],
        )
    assert not (tmp_path / "store").exists()


# In `jaxlm prepare`.


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A hundred short documents, in many batches and commits."""
    monkeypatch.setattr(encode, "BATCH", 2_000)
    monkeypatch.setattr(encode, "BESIDE", 0)
    monkeypatch.setattr(program, "COMMIT", 3_000)
    lines = [json.dumps(dict(text=f"Document {i} is here. " + "It has words! " * (i % 7))) for i in range(100)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    return dict(docs=f"jsonl:{tmp_path}/docs.jsonl")


AUGMENT = [dict(name="eda", copies=2), dict(name="noise", rate=0.2, kinds=("drop", "key")), dict(name="mix")]


@pytest.mark.parametrize("split", ["document", "tail"])
def test_validation_is_untouched_and_the_manifest_counts_the_copies(corpus, split, tmp_path):
    how = dict(validation=0.2, split=split, workers=1)
    plain = prepare(f"{tmp_path}/plain", corpus, dict(kind="huggingface", vocab=300), **how)
    more = prepare(f"{tmp_path}/more", corpus, dict(kind="huggingface", vocab=300), augment=AUGMENT, **how)
    held_out = "docs/validation", "tokenizer/tokenizer.json"
    for part in held_out:
        before, after = (
            {k.removeprefix(root): v for k, v in contents(tmp_path).items() if k.startswith(f"{root}/{part}")}
            for root in ("plain", "more")
        )
        assert before == after and before
    texts, copied = (read(made.split("docs", "train"), made.tokenizer()) for made in (plain, more))
    counts = more.manifest("docs")["copies"]
    assert sum(counts.values()) == len(copied) - len(texts) and counts["eda"] > 60 and counts["mix"] > 60
    assert [text for text in copied if text in set(texts)] == texts
    assert plain.manifest("docs")["copies"] == {} and plain.manifest("docs")["augment"] is None


def test_augmented_the_store_is_the_same_for_any_number_of_workers(corpus, tmp_path):
    for workers in (1, 2):
        prepare(f"{tmp_path}/{workers}", corpus, dict(kind="bytes"), augment=AUGMENT, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_augmented_and_killed_it_ends_in_the_very_same_bytes(corpus, tmp_path, monkeypatch):
    how = dict(augment=AUGMENT, validation=0.2, workers=1)
    prepare(f"{tmp_path}/straight", corpus, dict(kind="bytes"), **how)
    kills = 0

    def write_and_die(path, content):
        store.write_json(path, content)
        raise Killed

    monkeypatch.setattr(program, "write_json", write_and_die)
    for _ in range(60):
        try:
            prepare(f"{tmp_path}/killed", corpus, dict(kind="bytes"), **how)
            break
        except Killed:
            kills += 1
    assert kills > 4 and contents(tmp_path / "straight") == contents(tmp_path / "killed")


def test_augmented_differently_it_says_so(corpus, tmp_path):
    prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), augment=AUGMENT, workers=1)
    prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), augment=AUGMENT, workers=1)
    for augment in ((), AUGMENT[:2]):
        with pytest.raises(Mistake, match=r"augment: \[.* there, .* now"):
            prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), augment=augment, workers=1)


def test_other_synonyms_are_another_store(corpus, tmp_path):
    (tmp_path / "synonyms.txt").write_text("dog, hound\n")
    augment = [dict(name="eda", synonyms=f"{tmp_path}/synonyms.txt")]
    for _ in range(2):
        prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), augment=augment, workers=1)
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n")
    with pytest.raises(Mistake, match=r"augment: \[.*digest.* there, .* now"):
        prepare(f"{tmp_path}/store", corpus, dict(kind="bytes"), augment=augment, workers=1)


def test_a_workdir_that_is_trained_further_is_another_recipe(tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "100" / "params").write_bytes(b"one")
    specs = [dict(name="paraphrase", workdir=str(tmp_path))]
    before = augmentation.recipe(specs)
    assert before == augmentation.recipe(specs) and before[0].items() > specs[0].items()
    (tmp_path / "checkpoints" / "100").rename(tmp_path / "checkpoints" / "200")
    assert before != augmentation.recipe(specs)


def write_pair(workdir, tokenizer):
    """The workdir of a tiny encoder-decoder that was never trained: it writes, whatever it may be."""
    section = dict(name="t5", layers=1, width=16, heads=2, head_width=8, mlp_width=32, context=64)
    blueprint = Blueprint.of(section, vocab=tokenizer.vocab)
    workdir.mkdir()
    tokenizer.save(workdir / "tokenizer")
    configs.write(dict(model=section, length=64), str(workdir))
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(1, dict(params=noisy(blueprint)))
    return str(workdir)


def test_encoder_decoder_workdirs_translate_and_paraphrase(corpus, tmp_path):
    tokenizer = tokenizers.train(TEXTS, dict(kind="sentencepiece", algorithm="bpe", vocab=320))
    there, back = (write_pair(tmp_path / name, tokenizer) for name in ("there", "back"))
    (tmp_path / "few.txt").write_text("A dog barks.\nIt rains. It pours!\n" + "long " * 100 + "\n")
    models = [
        dict(name="translate", there=there, back=back, beams=2, max_new_tokens=8),
        dict(name="paraphrase", model=there, beams=3, copies=2, max_new_tokens=8),
    ]
    sources = dict(few=f"text:{tmp_path}/few.txt?documents=line")
    for workers in (1, 2):
        made = prepare(
            f"{tmp_path}/{workers}", sources, dict(kind="bytes"), augment=models, validation=0, workers=workers
        )
    copied = read(made.split("few", "train"), made.tokenizer())
    assert {"A dog barks.", "It rains. It pours!", ("long " * 100)} <= set(copied)
    copies = made.manifest("few")["copies"]  # what an untrained model writes twice is one copy
    assert 1 <= copies["translate"] <= 2 <= copies["paraphrase"] <= 4 and len(copied) == 3 + sum(copies.values())
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_the_command_augments_as_the_config_says(corpus, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    return ConfigDict(dict(store='{tmp_path}/store', prepare=dict(sources={corpus!r},\n"
        "        tokenizer=dict(kind='bytes'), augment=[dict(name='noise', rate=0.5, kinds=('drop',))])))\n"
    )
    for _ in range(2):
        program.main([f"--config={config}", "--workers=1"])
    assert store.open(f"{tmp_path}/store").manifest("docs")["copies"]["noise"] > 60
