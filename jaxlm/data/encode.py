"""Encode texts in parallel processes; the results come in the order of the texts, the same for any number of processes.

    texts                                     ("Once upon", ""), ("", "a time"), ...        (training, validation) text
    encode(texts, tokenizer, workers=4)       (2, [Part("train", [2 71 12 3], [4], [9]), Part("validation", ...)]), ...

Read `encode` first.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import itertools
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import numpy as np

from jaxlm.data.augmentation import Augmentation
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.lookup import Mistake

BATCH = 1 << 18  # characters that a worker encodes at a time
ALONE = 16  # batches that this process encodes itself before it starts others: small corpora are done by then

Batch = list[tuple[str, str]]  # (split, text)


class Part(NamedTuple):
    """Documents of one split: their tokens end to end, and for each its number of tokens and of UTF-8 bytes of text."""

    split: str
    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    copies: Mapping[str, int] = Counter()  # how many of them augmentation made, by the kind of rule


def dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds its ids."""
    return "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"


def encode(
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    workers: int,
    read: int = 0,
    augmentation: Augmentation = Augmentation(),
) -> Iterator[tuple[int, list[Part]]]:
    """Encode pairs of (training text, validation text), of which `read` were read before; training text augmented.

    Where a rule asks a model, this process does it all: the model is there once. Yields how many pairs are read by now, and what came of the latest. Memory is bounded: a few batches for each worker
    are under way at a time.
    """
    batches = _batches(texts, read)
    for read, batch in itertools.islice(batches, None if workers == 1 or augmentation.by_model else ALONE):
        yield read, _encode(tokenizer, augmentation, batch)
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the libraries, held or not
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, _start, (tokenizer, augmentation)) as pool:
        try:
            for read, batch in batches:
                waiting.append((read, pool.submit(_work, batch)))
                if len(waiting) > 2 * workers:
                    read, future = waiting.popleft()
                    yield read, future.result()
            for read, future in waiting:
                yield read, future.result()
        except BrokenProcessPool as e:
            raise Mistake("a worker process died, perhaps for want of memory; run again with fewer workers") from e


def _batches(texts: Iterable[tuple[str, str]], read: int) -> Iterator[tuple[int, Batch]]:
    batch: Batch = []
    size = 0
    for train, validation in texts:
        read += 1
        batch += [(split, text) for split, text in (("train", train), ("validation", validation)) if text]
        size += len(train) + len(validation)
        if size >= BATCH:
            yield read, batch
            batch, size = [], 0
    if batch:
        yield read, batch


def _encode(tokenizer: Tokenizer, augmentation: Augmentation, batch: Batch) -> list[Part]:
    before = [tokenizer.bos] if tokenizer.add_bos else []
    after = [tokenizer.eos] if tokenizer.add_eos else []
    parts = []
    for split in sorted({split for split, _ in batch}):
        texts, copies = [text for of, text in batch if of == split], Counter()
        if split == "train" and augmentation:
            texts, copies = augmentation(texts)
        documents = [np.array([*before, *ids, *after], dtype(tokenizer)) for ids in tokenizer.encode_batch(texts)]
        lengths, sizes = [len(document) for document in documents], [len(text.encode()) for text in texts]
        counts = np.array(lengths, np.int64), np.array(sizes, np.int64)
        parts.append(Part(split, np.concatenate(documents), *counts, copies))
    return parts


def _start(tokenizer: Tokenizer, augmentation: Augmentation) -> None:
    """Set a worker up: it has the tokenizer and the rules, leaves Ctrl-C to its parent, and does not outlive it."""
    global _tools
    _tools = tokenizer, augmentation
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """After kill -9 of the parent a worker would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_tools: tuple[Tokenizer, Augmentation] | None = None


def _work(batch: Batch) -> list[Part]:
    assert _tools is not None
    return _encode(*_tools, batch)
