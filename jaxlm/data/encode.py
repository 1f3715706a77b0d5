"""Encode texts in parallel processes; the results come in the order of the texts, the same for any number of processes.

    texts                                     ("Once upon", ""), ("", "a time"), ...        (training, validation) text
    encode(texts, tokenizer, workers=4)       (2, [Part("train", [2 71 12 3], [4], [9]), Part("validation", ...)]), ...

Read `encode` first.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import itertools
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import numpy as np

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


def dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds its ids."""
    return "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"


def encode(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, workers: int, read: int = 0
) -> Iterator[tuple[int, list[Part]]]:
    """Encode pairs of (training text, validation text), of which `read` were read before.

    Yields how many pairs are read by now, and what came of the latest. Memory is bounded: a few batches for each worker
    are under way at a time.
    """
    batches = _batches(texts, read)
    for read, batch in itertools.islice(batches, None if workers == 1 else ALONE):
        yield read, _encode(tokenizer, batch)
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the libraries, held or not
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, _start, (tokenizer,)) as pool:
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


def _encode(tokenizer: Tokenizer, batch: Batch) -> list[Part]:
    before = [tokenizer.bos] if tokenizer.add_bos else []
    after = [tokenizer.eos] if tokenizer.add_eos else []
    parts = []
    for split in sorted({split for split, _ in batch}):
        texts = [text for of, text in batch if of == split]
        documents = [np.array([*before, *ids, *after], dtype(tokenizer)) for ids in tokenizer.encode_batch(texts)]
        lengths, sizes = [len(document) for document in documents], [len(text.encode()) for text in texts]
        parts.append(Part(split, np.concatenate(documents), np.array(lengths, np.int64), np.array(sizes, np.int64)))
    return parts


def _start(tokenizer: Tokenizer) -> None:
    """Set a worker up: it has the tokenizer, leaves Ctrl-C to its parent, and does not outlive it."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """After kill -9 of the parent a worker would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_tokenizer: Tokenizer | None = None


def _work(batch: Batch) -> list[Part]:
    assert _tokenizer is not None
    return _encode(_tokenizer, batch)
