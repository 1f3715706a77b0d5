"""Promises of the training rows: a pure function of (seed, row), the same on any number of hosts."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from jaxlm.data import rows, tokenizers
from jaxlm.data import store as token_store
from jaxlm.lookup import Mistake

LENGTH = 9


class Memory:
    """A split of a token store, in memory."""

    def __init__(self, documents):
        self.tokens = np.concatenate([*documents, np.zeros(0, np.int32)]).astype(np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
        self.bytes = np.array([3 * len(d) - 3 for d in documents], np.int64)
        self.tokens_count = len(self.tokens)

    def __len__(self):
        return len(self.offsets) - 1

    def read(self, start, stop):
        return self.tokens[start:stop]


class MemoryStore:
    path = "memory"

    def __init__(self, **sources):
        self.splits = {source: Memory(documents) for source, documents in sources.items()}
        self.sources = sorted(sources)

    def split(self, source, split):
        return self.splits[source]

    def predicted_bytes(self, source, split, documents):
        return int(self.splits[source].bytes[documents].sum())


def documents_of(first, count=40, seed=0):
    """Documents of rising token ids, so that each token tells where it is from."""
    sizes = np.random.default_rng(seed).integers(2, 25, count)
    ends = np.cumsum(sizes)
    return [np.arange(first + end - size, first + end) for size, end in zip(sizes, ends)]


@pytest.fixture
def store():
    return MemoryStore(docs=documents_of(1), code=documents_of(10_000, 25, 1), chat=documents_of(20_000, 5, 2))


def same(row, other):
    return all(np.array_equal(row[name], other[name]) for name in ("tokens", "segments"))


def tokens_of(dataset):
    return set(np.concatenate([dataset[i]["tokens"] for i in range(len(dataset))]).tolist()) - {0}


def source_of(row):
    return ("docs", "code", "chat")[int(row["tokens"][0]) // 10_000]


def test_a_row_is_tokens_with_segments_from_one_and_zeros_as_padding():
    store = MemoryStore(docs=[np.array([5, 6, 7]), np.array([8, 9, 10, 11])])
    row = rows.train(store, length=9, seed=0)[0]
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 10, 11, 0, 0]
    assert row["segments"].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row["tokens"].dtype == row["segments"].dtype == np.int32


@pytest.mark.parametrize("held", [0, 1 << 20], ids=["read at random", "held decoded"])
def test_rows_of_a_store_on_disk_equal_those_in_memory(tmp_path, monkeypatch, held):
    monkeypatch.setattr(token_store, "HELD", held)
    documents = documents_of(1)
    writer = token_store.Writer(f"{tmp_path}/docs", "uint16")
    lengths = np.array([len(document) for document in documents])
    for split in token_store.SPLITS:
        writer.append(split, np.concatenate(documents).astype(np.uint16), lengths, 3 * lengths - 3)
    token_store.write_json(tmp_path / "docs" / "manifest.json", dict(splits=writer.commit(), vocab=1_000))
    tokenizers.train([], dict(kind="bytes")).save(tmp_path / "tokenizer")
    disk, memory = token_store.open(str(tmp_path)), MemoryStore(docs=documents)
    for packing in ("best_fit", "split", "alone"):
        a, b = (rows.train(store, length=LENGTH, seed=0, packing=packing) for store in (disk, memory))
        assert all(same(a[i], b[i]) for i in range(100))
        assert a[0]["tokens"].dtype == np.int32
    a, b = (rows.validation(store, "docs", length=LENGTH) for store in (disk, memory))
    assert (len(a), a.bytes) == (len(b), b.bytes)


def test_without_isolation_the_documents_of_a_row_are_one_segment():
    store = MemoryStore(docs=[np.array([5, 6, 7]), np.array([8, 9, 10, 11])])
    row = rows.train(store, length=9, seed=0, packing="split", isolate=False)[0]
    assert row["segments"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("packing", ["best_fit", "split", "alone"])
def test_an_epoch_predicts_every_token_but_a_documents_first_exactly_once(store, packing):
    stream = rows.train(store, length=LENGTH, seed=3, packing=packing, weights={"docs": 1})
    seen, index = Counter(), 0
    wanted = Counter(int(token) for document in documents_of(1) for token in document[1:])
    while seen.total() < 3 * wanted.total():
        row = stream[index]
        inside = (row["segments"][1:] == row["segments"][:-1]) & (row["segments"][1:] > 0)
        assert (row["tokens"][1:][inside] == row["tokens"][:-1][inside] + 1).all()
        seen.update(row["tokens"][1:][inside].tolist())
        index += 1
    assert seen == Counter({token: 3 for token in wanted})


@pytest.mark.parametrize("count", [40, 8_200], ids=["few rows", "many rows"])
def test_each_epoch_holds_every_row_once_in_a_new_order(count):
    stream = rows.train(MemoryStore(docs=[np.array([i, i]) for i in range(1, count + 1)]), length=2, seed=0)
    epochs = [[int(stream[epoch * count + i]["tokens"][0]) for i in range(count)] for epoch in (3, 10**9)]
    assert all(sorted(epoch) == list(range(1, count + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 2


def test_a_row_depends_on_nothing_but_the_seed_and_its_index(store):
    forwards = [rows.train(store, length=LENGTH, seed=7)[i] for i in range(60)]
    stream = rows.train(store, length=LENGTH, seed=7)
    assert all(same(stream[i], forwards[i]) for i in reversed(range(60)))
    other = rows.train(store, length=LENGTH, seed=8)
    assert not all(same(other[i], forwards[i]) for i in range(60))


@pytest.mark.parametrize("start", [0, 10**12])
def test_a_mixture_keeps_its_weights_in_any_stretch(store, start):
    weights = {"docs": 5.0, "code": 3.0, "chat": 2.0}
    stream = rows.train(store, length=LENGTH, seed=0, weights=weights)
    sources = [source_of(stream[start + i]) for i in range(400)]
    for stretch in (sources[:20], sources[37:137], sources):
        shares = Counter(stretch)
        assert all(abs(shares[name] - len(stretch) * weight / 10) <= 3 for name, weight in weights.items())


def test_without_weights_every_source_has_the_share_of_its_size(store):
    stream = rows.train(store, length=LENGTH, seed=0)
    whole = {name: len(rows.Rows(s, rows.best_fit(s.offsets, LENGTH))) for name, s in store.splits.items()}
    counted = Counter(source_of(stream[i]) for i in range(2 * sum(whole.values())))
    assert all(abs(counted[name] - 2 * whole[name]) <= 3 for name in whole)


def test_a_source_keeps_its_own_order_whatever_it_is_mixed_with(store):
    alone = rows.train(store, length=LENGTH, seed=5, weights={"docs": 1})
    mixed = rows.train(store, length=LENGTH, seed=5, weights={"docs": 1, "code": 2, "chat": 0})
    docs = [row for row in (mixed[i] for i in range(60)) if source_of(row) == "docs"]
    assert len(docs) == 20
    assert all(same(row, alone[i]) for i, row in enumerate(docs))
    assert all(source_of(mixed[i]) != "chat" for i in range(60))


def test_sources_of_one_size_are_not_shuffled_alike():
    store = MemoryStore(**{name: [np.array([i, i]) for i in range(30)] for name in ("docs", "code")})
    streams = [rows.train(store, length=2, seed=0, weights={name: 1}) for name in store.sources]
    orders = [[int(stream[i]["tokens"][0]) for i in range(30)] for stream in streams]
    assert orders[0] != orders[1]


def test_a_step_starts_the_same_whether_the_run_was_resumed_or_not(store):
    stream = rows.train(store, length=LENGTH, seed=0)
    whole = list(islice(rows.batches(stream, batch=4, threads=2), 8))
    resumed = list(islice(rows.batches(stream, batch=4, start_step=5, threads=0), 3))
    assert all(same(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    assert whole[0]["tokens"].shape == (4, LENGTH)
    assert same(whole[3], {name: np.stack([stream[12 + i][name] for i in range(4)]) for name in ("tokens", "segments")})


@pytest.mark.parametrize("hosts", [[[(0, 8)]], [[(0, 4)], [(4, 8)]], [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(store, hosts):
    stream = rows.train(store, length=LENGTH, seed=0)
    expected = next(islice(rows.batches(stream, batch=8), 2, None))["tokens"]
    found = np.zeros_like(expected)
    for ranges in hosts:
        part = next(islice(rows.batches(stream, batch=8, start_step=1, rows=ranges), 1, None))["tokens"]
        for start, stop in ranges:
            found[start:stop], part = part[: stop - start], part[stop - start :]
    np.testing.assert_array_equal(found, expected)


def test_features_are_made_from_each_row_and_noise_from_its_index(store):
    features = lambda row, rng: {"inputs": row["tokens"][:-1], "noise": rng.random(1)}  # noqa: E731
    stream, how = rows.train(store, length=LENGTH, seed=0), dict(batch=4, features=features, seed=0)
    whole = list(islice(rows.batches(stream, **how), 3))
    resumed = next(rows.batches(stream, start_step=2, rows=[(1, 3)], **how))
    assert whole[0]["inputs"].shape == (4, LENGTH - 1)
    np.testing.assert_array_equal(resumed["noise"], whole[2]["noise"][1:3])
    assert len({float(n) for batch in whole for n in batch["noise"].ravel()}) == 12


def test_validation_covers_whole_documents_and_knows_their_bytes(store):
    held_out = rows.validation(store, "code", length=LENGTH)
    documents = documents_of(10_000, 25, 1)
    assert held_out.bytes == sum(3 * len(d) - 3 for d in documents)
    assert held_out.plan.predicted == sum(len(d) - 1 for d in documents)
    assert tokens_of(held_out) == set(np.concatenate(documents))


def document_of(row, prefix=""):
    """The one document that a row of `store` is of."""
    tokens, segments = row[f"{prefix}tokens"], row[f"{prefix}segments"]
    assert set(segments) <= {0, 1} and not tokens[segments == 0].any() and segments[0] == 1
    ends = np.cumsum([len(document) for document in documents_of(1)])
    (found,) = set(np.searchsorted(ends, tokens[segments == 1]).tolist())
    return found


def test_beside_each_row_of_pairs_stands_one_of_another_document_and_every_one_may(store):
    stream = rows.train(store, length=LENGTH, seed=1, pairs=True, weights={"docs": 1})
    assert all(document_of(stream[i]) != document_of(stream[i], "other_") for i in range(500))
    held_out = rows.validation(store, "docs", length=LENGTH, pairs=True)
    drawn = {document_of(held_out.draw(7, np.random.default_rng(i)), "other_") for i in range(3000)}
    assert drawn == set(range(40)) - {document_of(held_out[7])}
    beside = {}
    for i in range(400):
        beside.setdefault(int(stream[i]["tokens"][0]), set()).add(int(stream[i]["other_tokens"][0]))
    assert max(map(len, beside.values())) > 1, "in another epoch beside another"


def test_held_out_pairs_are_whole_documents_and_the_same_each_time(store):
    one, again = (rows.validation(store, "docs", length=LENGTH, pairs=True) for _ in range(2))
    assert all(np.array_equal(one[i][name], again[i][name]) for i in range(len(one)) for name in one[i])
    assert tokens_of(one) == set(np.concatenate(documents_of(1)))
    assert all(document_of(one[i]) != document_of(one[i], "other_") for i in range(len(one)))
    few = rows.validation(store, "docs", length=LENGTH, pairs=True, documents=3)
    assert len({document_of(few[i], "other_") for i in range(len(few))}) <= 3


def test_pairs_are_the_same_on_any_number_of_hosts(store):
    stream = rows.train(store, length=LENGTH, seed=0, pairs=True)
    whole = next(rows.batches(stream, batch=8, start_step=3))
    parts = [next(rows.batches(stream, batch=8, start_step=3, rows=[(r, r + 2)])) for r in (0, 2, 4, 6)]
    assert all(np.array_equal(np.concatenate([part[name] for part in parts]), whole[name]) for name in whole)


def test_a_limited_validation_takes_whole_documents_from_all_over_the_split(store):
    held_out = rows.validation(store, "code", length=LENGTH, documents=5)
    chosen = documents_of(10_000, 25, 1)[::5]
    assert held_out.bytes == sum(3 * len(d) - 3 for d in chosen)
    assert tokens_of(held_out) == set(np.concatenate(chosen))
    whole, more = (rows.validation(store, "code", length=LENGTH, documents=documents) for documents in (None, 99))
    assert more.bytes == whole.bytes


def test_the_last_batch_of_a_finite_data_set_is_filled_with_padding(store):
    held_out = rows.validation(store, "chat", length=LENGTH)
    batches = list(rows.batches(held_out, batch=4))
    assert len(batches) == -(-len(held_out) // 4)
    assert {batch["tokens"].shape for batch in batches} == {(4, LENGTH)}
    segments = np.concatenate([batch["segments"] for batch in batches])
    assert (segments[: len(held_out)] > 0).any(axis=1).all()
    assert not segments[len(held_out) :].any()
    assert sum(len(list(rows.batches(held_out, batch=4, rows=[(r, r + 1)]))) for r in range(4)) == 4 * len(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights={"dosc": 1}), "data.weights: the store has no 'dosc'; did you mean 'docs'.*chat, code, docs"),
        (dict(packing="bestfit"), "data.packing has no 'bestfit'; did you mean 'best_fit'"),
        (dict(length=1), "at least 2 tokens"),
    ],
)
def test_a_mistake_in_the_config_names_the_choices(store, options, message):
    with pytest.raises(Mistake, match=message):
        rows.train(store, **dict(length=LENGTH, seed=0) | options)


def test_a_source_with_nothing_to_predict_is_a_mistake():
    store = MemoryStore(docs=[np.array([1])], none=[])
    with pytest.raises(Mistake, match=r"source 'docs'.*nothing to predict"):
        rows.train(store, length=LENGTH, seed=0, weights={"docs": 1})
    with pytest.raises(Mistake, match=r"source 'none'.*nothing to predict"):
        rows.validation(store, "none", length=LENGTH)
    with pytest.raises(Mistake, match="store memory has no 'dcs'"):
        rows.validation(store, "dcs", length=LENGTH)
    with pytest.raises(Mistake, match=r"source 'docs'.*one document in its train split; pairs take text of another"):
        rows.train(MemoryStore(docs=[np.arange(50)]), length=LENGTH, seed=0, pairs=True)


def test_rows_outside_the_batch_are_refused(store):
    with pytest.raises(ValueError, match=r"\(6, 9\).* not ranges within a batch of 8"):
        rows.batches(rows.train(store, length=LENGTH, seed=0), batch=8, rows=[(6, 9)])


def test_a_seed_below_0_is_a_mistake(store):
    with pytest.raises(Mistake, match=r"config.seed=-1 is a whole number from 0 up"):
        rows.train(store, length=LENGTH, seed=-1)
