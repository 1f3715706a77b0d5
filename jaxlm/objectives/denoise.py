"""Denoising as BART does: from a text with gaps, its sentences out of order, write the text (arXiv:1910.13461, 2.2).

    a document   [5 6 7 . 8 9 . 2]        eos 2, <mask> 4
    permuted     [8 9 . 5 6 7 .]          its sentences, which end with full stops, in any order
    infilled     [4 9 4 . 4 7 .]          about `rate` of the tokens gone, one mask for each span that has gone
    source       [4 9 4 . 4 7 . 2]        the mask before the full stop stands for nothing: a span of no tokens
    target       [5 6 7 . 8 9 . 2]

The lengths of spans are drawn from a Poisson distribution with mean `span`; the last one is cut to what is missing to
the rate. Spans lie anywhere, as likely as anywhere else; of those without tokens there are at most as many as leave the
source no longer than the target, which fills `length`. Specials stay where they are: a span that meets one is two.
"""

from collections.abc import Mapping

import numpy as np

from jaxlm.data.words import MASK, Words
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs
from jaxlm.objectives._pairs import Sheet
from jaxlm.objectives._pairs import loss as loss

KINDS = ("encoder-decoder",)
EXACT = False


def row(length: int, words: Words, *, rate: float = 0.3, span: float = 3.0, permute: bool = True) -> int:
    """As many tokens as there is room for, with eos behind them."""
    _pairs.eos(words)
    _pairs.share("rate", rate)
    words.find("mask", MASK)
    if not isinstance(span, int | float) or span <= 0:
        raise Mistake(f"config.objective.span={span!r}: the mean length of a span, above 0")
    return length - 1


def features(
    row: Mapping[str, np.ndarray], rng: np.random.Generator, words: Words, length: int, *, rate: float = 0.3,
    span: float = 3.0, permute: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row -> its documents, each damaged and whole, as one example."""
    sheet, mask = Sheet("encoder-decoder", length, length, words), words.find("mask", MASK)
    for document in _pairs.shuffled(_pairs.documents(row, words), rng):
        document = sheet.cut(document, rng, _sizes)
        special = words.special_V[document]
        if special.all():
            continue
        noisy = permuted(document, special, words.stops_V[document], rng) if permute else document
        sheet.add(infilled(noisy, words.special_V[noisy], mask, rng, rate=rate, span=span), document)
    return sheet.example()


def _sizes(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Either side's length at most: the text and eos."""
    tokens = np.arange(1, len(document) + 1) + 1
    return tokens, tokens


def permuted(tokens: np.ndarray, special: np.ndarray, stops: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tokens with their sentences in any order; a sentence ends behind a stop, and no sentence passes a special."""
    out, begins = [], np.flatnonzero(special[1:] != special[:-1]) + 1
    for part in np.split(np.arange(len(tokens)), begins):
        sentences = np.split(tokens[part], np.flatnonzero(stops[part][:-1]) + 1)
        order = range(1) if special[part[0]] else rng.permutation(len(sentences))
        out += [tokens[part]] if special[part[0]] else [sentences[i] for i in order]
    return np.concatenate(out)


def infilled(
    tokens: np.ndarray, special: np.ndarray, mask: int, rng: np.random.Generator, *, rate: float, span: float
) -> np.ndarray:
    """The tokens with about `rate` of those that are not special in spans, one `mask` for each span."""
    lengths = _lengths(round(rate * int((~special).sum())), span, rng)
    none, lengths = (lengths == 0).sum(), lengths[lengths > 0]
    # Tokens that stay and spans in any order: which of them all are spans?
    items = np.ones((~special).sum() - lengths.sum() + len(lengths), int)
    where = np.sort(rng.choice(len(items), len(lengths), replace=False))
    items[where] = lengths
    names = np.zeros(len(items), int)
    names[where] = np.arange(1, len(where) + 1)
    name = np.zeros(len(tokens), int)  # of the span that a token is in
    name[~special] = np.repeat(names, items)
    first = (name > 0) & (name != np.append(0, name[:-1]))
    out = np.where(first, mask, tokens)[(name == 0) | first]
    none = min(none, len(tokens) - len(out))
    return np.insert(out, rng.integers(1, len(out) + 1, none), mask)


def _lengths(tokens: int, span: float, rng: np.random.Generator) -> np.ndarray:
    """Lengths of spans, until there are so many tokens in them."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(int(rng.poisson(span)), left))
    return np.array(lengths, int)
