"""Packing: which tokens stand in which training row, planned once from the offsets of the documents.

    offsets = [0, 5, 12, 15]       three documents: AAAAA BBBBBBB CCC
    split(offsets, 6)              AAAAAB BBBBBB BCCC..    a row starts with the last token of the row before it
    best_fit(offsets, 6)           BBBBBB AAAAA. BBCCC.    only B, which fits no row, is cut, and one token repeated
    alone(offsets, 6)              AAAAA. BBBBBB BB.... CCC...    the same pieces, each in a row of its own
    best_fit(offsets, 6)[2]        ([10, 12], [2, 3])      where a row's pieces start in the stream, and their lengths
    best_fit(offsets, 6).padding   2 / 18                  the share of all places that hold no token

All keep one promise: every token but the first of its document is, in exactly one row, preceded by its predecessor.
So each is predicted exactly once an epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Cost = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows as pieces of documents: row i holds pieces first[i] to first[i + 1], 12 bytes a piece and 8 a row."""

    length: int
    starts: np.ndarray  # int64[pieces], in the stream of all tokens
    lengths: np.ndarray  # int32[pieces]
    first: np.ndarray  # int64[rows + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the pieces in one row, in stream order."""
        pieces = slice(self.first[row], self.first[row + 1])
        return self.starts[pieces], self.lengths[pieces]

    @property
    def predicted(self) -> int:
        """Tokens that have a predecessor in their piece: those that a causal model is asked for in one epoch."""
        return int(self.lengths.sum(dtype=np.int64)) - len(self.lengths)

    @property
    def padding(self) -> float:
        """The share of places in all rows that hold no token."""
        places = len(self) * self.length
        return 1 - int(self.lengths.sum(dtype=np.int64)) / places if places else 0.0


def split(offsets: np.ndarray, length: int) -> Plan:
    """Concatenate all documents and split the stream into rows of `length`; row i starts at token i (length - 1).

    `offsets` is int64[documents + 1], `length` at least 2. Documents are cut where rows end; the last row is padded.
    """
    step, total = length - 1, int(offsets[-1])
    rows = np.arange(-(-(total - 1) // step) if total > 1 else 0)
    inner = np.unique(offsets[(offsets > 0) & (offsets < total)])  # documents that start inside a row
    starts = np.concatenate([inner, rows * step])
    row = np.concatenate([(inner - 1) // step, rows])
    order = np.argsort(starts, kind="stable")  # a document that starts on a row's last token comes before the next row
    starts, row = starts[order], row[order]
    first = np.searchsorted(row, np.arange(len(rows) + 1))
    stops = np.append(starts[1:], total)
    stops[first[1:] - 1] = np.minimum(rows * step + length, total)
    return Plan(length, starts, (stops - starts).astype(np.int32), first)


def best_fit(
    offsets: np.ndarray, length: int, documents: np.ndarray | None = None, cost: Cost | None = None
) -> Plan:  # fmt: skip
    """Cut only documents longer than a row; each piece, the longest first, goes to the row with the least room for it.

    Best-fit-decreasing as in arXiv:2404.10830; the arguments are those of `alone`, and `cost` gives the room
    that pieces of so many tokens take, at least as many, and `length` at most.
    """
    pieces = alone(offsets, length, documents)
    row, rows = _best_fit_decreasing(cost(pieces.lengths) if cost else pieces.lengths, length)
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return Plan(length, pieces.starts[order], pieces.lengths[order], first)


def alone(offsets: np.ndarray, length: int, documents: np.ndarray | None = None) -> Plan:
    """Cut documents longer than a row, and give each piece a row of its own, in the order of the stream.

    `offsets` is int64[documents + 1], `length` at least 2, `documents` the indices of those to pack (all), rising.
    Documents of fewer than two tokens predict nothing and are left out.
    """
    begins, ends = offsets[:-1], offsets[1:]
    if documents is not None:
        begins, ends = begins[documents], ends[documents]
    count = np.maximum(-(-(ends - begins - 1) // (length - 1)), 0)
    document = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    starts = begins[document] + nth * (length - 1)
    lengths = np.minimum(ends[document] - starts, length).astype(np.int32)
    return Plan(length, starts, lengths, np.arange(len(starts) + 1))


def _best_fit_decreasing(lengths: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """The row of each piece, int32[pieces], and the number of rows.

    Pieces of one size are alike, and so are rows with the same room: whole groups of them are matched at a time. A
    group that takes pieces keeps less than half its room, so there are O(length log length) matches in all.
    """
    by_size = np.argsort((length - lengths).astype(np.min_scalar_type(length)), kind="stable")  # 16 bits: a radix sort
    row = np.empty(len(lengths), np.int32)
    groups: list[list[np.ndarray]] = [[] for _ in range(length + 1)]  # by room: the rows that have it
    rooms = 0  # bit r is set while groups[r] has rows
    rows = done = 0
    counts = np.bincount(lengths)
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                group = groups[room].pop()
                if not groups[room]:
                    rooms ^= 1 << room
            else:
                room = length
                group = np.arange(rows, rows - (-left // (length // size)), dtype=np.int32)
                rows += len(group)
            fill = room // size  # the row just chosen now has the least room, so it is chosen again until it is full
            taken = min(left, fill * len(group))
            full, rest = divmod(taken, fill)
            row[by_size[done : done + taken]] = np.repeat(group, fill)[:taken]
            done, left = done + taken, left - taken
            used = full + (rest > 0)
            for less, part in ((fill, group[:full]), (rest, group[full:used]), (0, group[used:])):
                if len(part):
                    groups[room - less * size].append(part)
                    rooms |= 1 << (room - less * size)
    return row, rows


PACKINGS = {"best_fit": best_fit, "split": split, "alone": alone}
