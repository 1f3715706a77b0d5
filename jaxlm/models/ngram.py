"""Counting baselines: interpolated modified Kneser-Ney n-grams (Chen & Goodman 1998) over a prepared data set, and xz.

    python -m jaxlm.models.ngram --store=data/python_docs --order=5     bits per byte on the validation split

    model = fit(documents, order=5, vocab=2048)
    model.nll(np.array([2, 71, 12, 9, 3]))      [5.1  3.9  4.4  1.2]    nats for each token but the document's first

A document's first token is given and the rest are predicted, as by the neural models, so that the figures compare. What
is missing from a context before that first token is filled with a padding symbol. All numpy; not a family to train.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
import lzma
import math
from typing import Any

import numpy as np

from jaxlm.lookup import Mistake


@dataclass(frozen=True, eq=False)
class Level:
    """The n-grams of one order, as sorted keys. Contexts go by their rank, so that keys fit 64 bits at any order.

    context key = oldest token * contexts of the level below + rank of the other tokens among those
    n-gram key = rank of the context * vocab + token
    """

    contexts: np.ndarray  # int64[contexts]
    ngrams: np.ndarray  # int64[ngrams]
    discounted: np.ndarray  # float64[ngrams]: (count - discount) / total of the context
    backoff: np.ndarray  # float64[contexts]: the mass that the discounts leave to the level below


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted n-gram model; `levels[k]` looks at k tokens of context."""

    vocab: int
    levels: list[Level]

    def nll(self, document: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats of tokens 1.. of a document, int[length] -> float64[length - 1].

        p_k(w | context) = (count - discount) / total + backoff * p_{k-1}(w | shorter context), down to 1 / vocab.
        """
        stream, at = _stream([document], len(self.levels), self.vocab)
        probability = np.full(len(at), 1 / self.vocab)
        context, seen = np.zeros(len(at), np.int64), np.ones(len(at), bool)
        below = 1
        for k, level in enumerate(self.levels):
            if k:
                context, known = _find(level.contexts, stream[at - k] * below + context)
                seen &= known
            ngram, counted = _find(level.ngrams, context * self.vocab + stream[at])
            probability = np.where(seen, level.backoff[context], 1) * probability
            probability += np.where(seen & counted, level.discounted[ngram], 0)
            below = len(level.contexts)
        return -np.log(probability)


def fit(documents: Iterable[np.ndarray], order: int, vocab: int) -> Model:
    """Count the n-grams of all documents (int[length] each, ids below `vocab`) up to `order` tokens, context included.

    The highest order keeps its counts; a lower one counts the distinct tokens seen before an n-gram (continuations).
    Needs about 140 bytes a token at order 5. Raises `Mistake` for an order below 1, an id outside the vocabulary, or
    nothing to predict.
    """
    if order < 1:
        raise Mistake(f"an n-gram has at least 1 token, not {order}")
    stream, at = _stream(documents, order, vocab)
    if not len(at):
        raise Mistake("no document of two tokens: an n-gram model has nothing to count")
    token, levels = stream[at], []
    context, contexts = np.zeros(len(at), np.int64), np.zeros(1, np.int64)
    ngram, ngrams = _rank(token)
    for k in range(1, order):
        longer_context, longer_contexts = _rank(stream[at - k] * len(contexts) + context)
        longer_ngram, longer_ngrams = _rank(longer_context * vocab + token)
        suffix = np.empty(len(longer_ngrams), np.int64)
        suffix[longer_ngram] = ngram
        levels.append(_level(contexts, ngrams, np.bincount(suffix), vocab))
        context, contexts, ngram, ngrams = longer_context, longer_contexts, longer_ngram, longer_ngrams
    levels.append(_level(contexts, ngrams, np.bincount(ngram), vocab))
    return Model(vocab, levels)


def baselines(store: Any, source: str, orders: Sequence[int] = (2, 5)) -> dict[str, float]:
    """Bits per byte on the validation text of one source: {"2-gram": 2.08, "5-gram": 1.69, "xz": 2.42}.

    `store` is a `jaxlm.data.store.Store`. N-grams learn from the training split; xz sees the validation text alone.
    Raises `Mistake` when no text was held out.
    """
    training, held_out = (_documents(store.split(source, split)) for split in ("train", "validation"))
    text_bytes = store.predicted_bytes(source, "validation")
    if not text_bytes:
        raise Mistake(f"source {source!r} of store {store.path} has no validation text to score")
    bits = {}
    for order in orders:
        model = fit(training, order, store.vocab)
        nats = sum(float(model.nll(document).sum()) for document in held_out)
        bits[f"{order}-gram"] = nats / math.log(2) / text_bytes
    tokenizer = store.tokenizer()
    return bits | {"xz": compressed_bits_per_byte(tokenizer.decode(document.tolist()) for document in held_out)}


def compressed_bits_per_byte(texts: Iterable[str]) -> float:
    """What `xz -9e` needs for each UTF-8 byte of all texts end to end, in bits."""
    content = "".join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def _stream(documents: Iterable[np.ndarray], order: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """All documents end to end, each after padding (id `vocab`) for its first context; where predicted tokens are."""
    documents = [np.asarray(document, np.int64) for document in documents if len(document)]
    padding = np.full(max(order - 2, 0), vocab)
    stream = np.concatenate([np.zeros(0, np.int64), *(part for document in documents for part in (padding, document))])
    lengths = np.array([len(document) for document in documents], np.int64)
    firsts = np.cumsum(lengths + len(padding)) - lengths
    predicted = (stream >= 0) & (stream < vocab)
    if np.count_nonzero(predicted) != lengths.sum():
        low, high = min(int(d.min()) for d in documents), max(int(d.max()) for d in documents)
        raise Mistake(f"documents hold token ids from {low} to {high}, but the vocabulary has {vocab}")
    predicted[firsts] = False
    return stream, np.flatnonzero(predicted)


def _level(contexts: np.ndarray, ngrams: np.ndarray, counts: np.ndarray, vocab: int) -> Level:
    """Discount the counts of one order; what is taken from a context's n-grams becomes its backoff."""
    context = ngrams // vocab
    total = np.bincount(context, weights=counts)
    taken = _discounts(counts)[np.minimum(counts, 3)]
    backoff = np.bincount(context, weights=taken) / total
    return Level(contexts, ngrams, (counts - taken) / total[context], backoff)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What to take from a count of 0, 1, 2, and 3 or more: float64[4], eq. 26 of Chen & Goodman.

    Tiny or odd corpora give no usable estimate (no n-gram seen exactly 1, 2, 3 or 4 times, or a discount that takes
    nothing, so that the unseen would be impossible): then 0.5, 1 and 1.5, as in KenLM.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (discounts[1:] > 0).all():
            return discounts
    return np.array([0, 0.5, 1, 1.5])


def _rank(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each key among the distinct ones, and the distinct ones in order."""
    distinct, rank = np.unique(keys, return_inverse=True)
    return rank, distinct


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each wanted key and whether it is there at all (if not, the rank is of some other key)."""
    rank = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return rank, keys[rank] == wanted


def _documents(split: Any) -> list[np.ndarray]:
    return np.split(split.read(0, split.tokens_count), split.offsets[1:-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print bits per byte of n-grams and xz on the validation split of each source in a store."""
    from jaxlm.data import store as token_store  # models do not know data; only this program joins them

    parser = argparse.ArgumentParser(prog="python -m jaxlm.models.ngram", description=main.__doc__)
    parser.add_argument("--store", required=True, help="a prepared token store")
    parser.add_argument("--order", type=int, nargs="+", default=[2, 5], help="tokens in an n-gram (default: 2 5)")
    flags = parser.parse_args(arguments)
    try:
        store = token_store.open(flags.store)
        for source in store.sources:
            for name, bits in baselines(store, source, flags.order).items():
                print(f"{source}  {name:8}{bits:.4f} bits per byte")
    except Mistake as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    main()
