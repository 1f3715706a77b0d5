"""Rows: what a model trains on, as a pure function of (seed, row index), read from the token store at random.

    {"tokens":   [ 2  7  9  3  2  8  3  0 ],        int32[length]: two documents and padding
     "segments": [ 1  1  1  1  2  2  2  0 ]}

    stream = train(store, weights={"docs": 2, "code": 1}, packing="best_fit", length=2049, seed=0)
    stream[10**9]                                   any row of the endless stream, without those before it
    batches(stream, batch=512, start_step=1000)     the batches of steps 1000, 1001, ...: this is how to resume
    batches(stream, batch=512, rows=[(0, 64)])      the first of eight hosts: its 64 of the same 512 rows
    held_out = validation(store, "docs", length=2049)
    held_out.bytes, held_out.plan.predicted         bits per byte = nats / log(2) / bytes
    train(store, pairs=True, ...)                   each row a piece of one document, and beside it, as "other_tokens"
                                                    and "other_segments", a piece of another document

Noise (masking, span corruption) is a function of (seed, row) too: `batches(..., features=corrupt, seed=seed)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
import sys
from typing import Any, TypeAlias, cast
import zlib

import grain
from grain.experimental import index_shuffle
import numpy as np

from jaxlm.data.mixing import plan
from jaxlm.data.packing import PACKINGS, Cost, Plan, alone, best_fit
from jaxlm.data.store import Split, Store
from jaxlm.lookup import Mistake, key, miss

Row: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Rows:
    """The packed rows of one split, at random access: {"tokens", "segments"}, int32[length] each.

    Segments number the documents in a row from 1; 0 is padding. With `isolate=False` all documents of a row are one
    segment: the classic GPT-2 stream, where a document sees the one before it. With `pairs`, of a plan whose rows hold
    one piece each, a row of another document stands beside each: {"other_tokens", "other_segments"}.
    """

    split: Split
    plan: Plan
    isolate: bool = True
    pairs: bool = False
    bytes: int | None = None  # UTF-8 bytes of the text that the rows ask for, where they cover whole documents

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Row:
        return self.draw(index, np.random.default_rng(index)) if self.pairs else self._read(index)

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """A row, and beside it any of those of the other documents, each as likely as the next."""
        first, stop = self._siblings(index)
        other = int(rng.integers(len(self) - (stop - first)))
        other += (stop - first) * (other >= first)
        return self._read(index) | {f"other_{name}": value for name, value in self._read(other).items()}

    def _siblings(self, index: int) -> tuple[int, int]:
        """The rows [first, stop) of the document that this row is of; one piece a row, in the order of the stream."""
        starts, offsets = self.plan.starts, self.split.offsets
        document = np.searchsorted(offsets, starts[index], side="right")
        first, stop = np.searchsorted(starts, offsets[document - 1 : document + 1])
        return int(first), int(stop)

    def _read(self, index: int) -> Row:
        starts, lengths = self.plan[index]
        row = {name: np.zeros(self.plan.length, np.int32) for name in ("tokens", "segments")}
        used = int(lengths.sum())
        row["segments"][:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths) if self.isolate else 1
        runs: list[list[int]] = []  # pieces that lie next to each other in the store are read at once
        for start, length in zip(starts.tolist(), lengths.tolist()):
            if runs and runs[-1][1] == start:
                runs[-1][1] += length
            else:
                runs.append([start, start + length])
        at = 0
        for start, stop in runs:
            row["tokens"][at : at + stop - start] = self.split.read(start, stop)
            at += stop - start
        return row


def train(
    store: Store,
    *,
    length: int,
    seed: int,
    packing: str = "best_fit",
    isolate: bool = True,
    pairs: bool = False,
    cost: Cost | None = None,
    **mixing: Any,
) -> grain.MapDataset[Row]:
    """The endless stream of training rows: element i is a pure function of (seed, i).

    Each source goes through its rows epoch after epoch, in a new order each time; how they take turns is said by the
    options of `jaxlm.data.mixing.plan`: without any, each has the share of its size. `cost` tells how much of a row's
    `length` documents of so many tokens take, where it is more (for `best_fit`, isolated). With `pairs`, nothing is
    packed: each row is a piece of one document, with a piece of another one of its source. Raises `Mistake` for wrong
    options, for a source that the store does not hold, a length below 2, a source in which there is nothing to predict,
    or of one document where `pairs` are asked for.
    """
    pack = key("data.packing", "alone" if pairs else packing, PACKINGS)
    if pack is best_fit and isolate:
        pack = partial(best_fit, cost=cost)

    @cache
    def rows(source: str) -> Rows:
        split = store.split(source, "train")
        found = Rows(split, _plan(pack, store, source, split, length), isolate, pairs)
        _check_pairs(found, store, source, "train")
        return found

    mixture = plan(store.sources, lambda source: len(rows(source)), **mixing)
    endless = {source: _epochs(rows(source), _fold(seed, source)) for source in mixture.names}

    def row(index: int) -> Row:
        source, nth = mixture[index]
        return cast(Row, endless[source][nth])

    return grain.MapDataset.range(sys.maxsize).map(row)


def validation(
    store: Store, source: str, *, length: int, documents: int | None = None, pairs: bool = False,
    cost: Cost | None = None,
) -> Rows:  # fmt: skip
    """All held-out documents, whole: each token but a document's first is predicted exactly once; `bytes` are exact.

    With `documents`, only that many of them, evenly spaced over the split. `pairs`, `cost` and what is raised are as
    in `train`; which row stands beside which is then always the same.
    """
    if source not in store.sources:
        raise miss(f"store {store.path}", source, store.sources)
    split = store.split(source, "validation")
    chosen = np.arange(len(split))
    if documents is not None and documents < len(split):
        chosen = np.arange(documents) * len(split) // documents
    pack = partial(alone, documents=chosen) if pairs else partial(best_fit, documents=chosen, cost=cost)
    plan = _plan(pack, store, source, split, length)
    rows = Rows(split, plan, pairs=pairs, bytes=store.predicted_bytes(source, "validation", chosen))
    _check_pairs(rows, store, source, "validation")
    return rows


def batches(
    dataset: grain.MapDataset[Row] | Rows,
    *,
    batch: int,
    start_step: int = 0,
    rows: Sequence[tuple[int, int]] | None = None,
    features: Callable[[Row, np.random.Generator | None], Row] | None = None,
    seed: int | None = None,
    threads: int = 4,
) -> Iterator[Row]:
    """Stack consecutive rows on a new first axis: the batch of step s is rows s * batch to (s + 1) * batch.

    A host that needs only some rows of each batch names them, as ranges [start, stop) within the batch. The last batch
    of a finite data set is filled up with zeros. `features(row, rng)` turns a row into what the model takes, with the
    noise of `rng`, a function of (seed, row index) alone; None without a `seed`. `threads` read ahead, two
    batches each.
    """
    if not isinstance(dataset, grain.MapDataset):
        dataset = grain.MapDataset.source(dataset)
    if features is not None and seed is not None:
        dataset = dataset.random_map(features, seed=_fold(seed, "noise"))
    elif features is not None:
        quiet = features
        dataset = dataset.map(lambda row: quiet(row, None))
    local = [row for r in rows for row in range(*r)] if rows is not None else list(range(batch))
    if min(local, default=-1) < 0 or max(local) >= batch:
        raise ValueError(f"rows {rows} are not ranges within a batch of {batch}")
    count = len(dataset)
    zeros = {name: np.zeros_like(value) for name, value in cast(Row, dataset[0]).items()}

    def stacked(step: int) -> Row:
        first = step * batch
        found = [cast(Row, dataset[first + row]) if first + row < count else zeros for row in local]
        return {name: np.stack([row[name] for row in found]) for name in zeros}

    # A batch is made at once: each of Grain's layers costs 5 to 15 µs an element.
    steps = grain.MapDataset.range(start_step, max(-(-count // batch), start_step)).map(stacked)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def _plan(pack: Callable[..., Plan], store: Store, source: str, split: Split, length: int) -> Plan:
    """Pack one split; raises `Mistake` where that leaves nothing to predict."""
    if length < 2:
        raise Mistake(f"rows of length {length} have nothing to predict; a row takes at least 2 tokens")
    plan = pack(split.offsets, length)
    if not plan.predicted:
        raise Mistake(f"source {source!r} of store {store.path}: no document of two tokens, so nothing to predict")
    return plan


def _check_pairs(rows: Rows, store: Store, source: str, split: str) -> None:
    """Raise `Mistake` where pairs are asked for, and all rows are of one document."""
    if rows.pairs and rows._siblings(0)[1] == len(rows):
        raise Mistake(
            f"source {source!r} of store {store.path}: one document in its {split} split; pairs take text of another"
        )


def _fold(seed: int, name: str) -> int:
    """A seed of its own for each source, and for noise, which does not change when others come or go."""
    if seed < 0:
        raise Mistake(f"config.seed={seed} is a whole number from 0 up")
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def _epochs(rows: Rows, seed: int) -> grain.MapDataset[Row]:
    """All rows in a new order, epoch after epoch, without end; with `pairs`, beside others each time."""
    count = len(rows)

    def number(index: int) -> int:
        epoch, nth = divmod(index, count)
        # Grain's shuffle takes 5 µs a row among many, but 60 µs among 1,000 and 4 ms among 10 (its cipher has 16 bits).
        if count > 1 << 13:
            return index_shuffle(nth, max_index=count - 1, seed=(seed + epoch) % 2**32, rounds=4)
        return _order(seed, epoch, count)[nth]

    endless = grain.MapDataset.range(sys.maxsize)
    if rows.pairs:
        return endless.map(number).random_map(rows.draw, seed=seed)
    return endless.map(lambda index: rows[number(index)])


@lru_cache(maxsize=32)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
