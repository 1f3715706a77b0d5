"""Work on batches of documents in parallel processes; results come in order, the same for any number of processes.

    ordered(work, documents, workers=4)     (2, work([doc 1, doc 2])), (5, work([doc 3, doc 4, doc 5])), ...
    encode(tokenizer, parts, rules, batch)  Encoded([Part("train", [2 71 12 3], [4], [9]), Part("validation", ...)], {})

Read `ordered` first.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import itertools
import multiprocessing
import os
import signal
import threading
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxlm.data.augmentation import Augmentation
from jaxlm.data.splits import Marked
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.lookup import Mistake

BATCH = 1 << 18  # characters that a worker takes at a time
ALONE = 2  # batches that this process does itself before it starts others: small corpora are done by then
BESIDE = 60  # and at most so many more while they start

Batch = list[Marked]
Result = TypeVar("Result")
Parts = Callable[[Batch], tuple[list[tuple[str, str]], Counter[str]]]  # (training, validation) texts, and counts


class Part(NamedTuple):
    """Documents of one split: their tokens end to end, and for each its number of tokens and of UTF-8 bytes of text."""

    split: str
    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds its ids."""
    return "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"


class Encoded(NamedTuple):
    """What came of a batch: parts of the splits, and what was counted on the way."""

    parts: list[Part]
    counts: Counter[str]


def ordered(
    work: Callable[[Batch], Result], documents: Iterable[Marked | None], workers: int, read: int = 0
) -> Iterator[tuple[int, Result]]:
    """Do `work` (picklable) on batches of documents, of which `read` were read before; None is left out.

    Yields how many documents are read by now, and the latest result. This process does the first batches itself, until
    the others have started. Memory is bounded: a few batches for each worker are under way at a time. Raises `Mistake`
    when a worker dies.
    """
    every = batches(documents, read)
    for read, batch in itertools.islice(every, None if workers == 1 else ALONE):
        yield read, work(batch)
    if (following := next(every, None)) is None:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the libraries, held or not
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, _start, (work,)) as pool:
        try:
            ready = [pool.submit(os.getpid) for _ in range(workers)]  # each starts a process
            every = itertools.chain([following], every)
            for read, batch in itertools.islice(every, BESIDE):
                yield read, work(batch)
                if all(future.done() for future in ready):
                    break
            for read, batch in every:
                waiting.append((read, pool.submit(_do, batch)))
                if len(waiting) > 2 * workers:
                    read, future = waiting.popleft()
                    yield read, future.result()
            for read, future in waiting:
                yield read, future.result()
        except BrokenProcessPool as e:
            raise Mistake("a worker process died, perhaps for want of memory; run again with fewer workers") from e


def batches(documents: Iterable[Marked | None], read: int) -> Iterator[tuple[int, Batch]]:
    """Cut documents, of which `read` were read before, into batches; each comes with how many are read by then."""
    batch: Batch = []
    size = begun = 0
    for marked in documents:
        read, begun = read + 1, begun + 1
        if marked:
            batch.append(marked)
            size += len(marked.document.text)
        if size >= BATCH:
            yield read, batch
            batch, size, begun = [], 0, 0
    if begun:
        yield read, batch


def encode(tokenizer: Tokenizer, parts_of: Parts, augmentation: Augmentation, batch: Batch) -> Encoded:
    """Turn a batch into tokens. `parts_of` gives pairs of (training text, validation text), and may leave documents
    out; training text is augmented.
    """
    pairs, counts = parts_of(batch)
    parts = []
    for side, split in enumerate(("train", "validation")):
        texts = [pair[side] for pair in pairs if pair[side]]
        if split == "train" and augmentation:
            texts, copies = augmentation(texts)
            counts.update({f"copies/{name}": n for name, n in copies.items()})
        if texts:
            sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], np.int64)
            parts.append(Part(split, *_documents(tokenizer, tokenizer.encode_batch(texts)), sizes))
    return Encoded(parts, counts)


def _documents(tokenizer: Tokenizer, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts end to end, with the bos and eos that the tokenizer adds, and the length of each document."""
    ends = [[tokenizer.bos] if tokenizer.add_bos else [], [tokenizer.eos] if tokenizer.add_eos else []]
    lengths = np.array([len(text) for text in ids], np.int64) + sum(map(len, ends))
    stops = np.cumsum(lengths)
    tokens, text = np.empty(stops[-1], dtype(tokenizer)), np.ones(stops[-1], bool)
    for special, at in zip(ends, (stops - lengths, stops - 1)):
        if special:
            tokens[at], text[at] = special[0], False
    count = int(lengths.sum()) - len(ids) * sum(map(len, ends))
    tokens[text] = np.fromiter(itertools.chain.from_iterable(ids), tokens.dtype, count)
    return tokens, lengths


def _start(work: Callable[[Batch], Any]) -> None:
    """Set a worker up: it knows its work, leaves Ctrl-C to its parent, and does not outlive it."""
    global _its_work
    _its_work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """After kill -9 of the parent a worker would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_its_work: Callable[[Batch], Any] | None = None


def _do(batch: Batch) -> Any:
    assert _its_work is not None
    return _its_work(batch)
