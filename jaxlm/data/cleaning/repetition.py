"""Repetition rules of Gopher (arXiv:2112.11446, Table A1): text that says the same again and again goes.

What repeats is counted from its second time on, and each character once. Words stand between blanks, and characters are
those of words. The most frequent n-gram counts each time that it occurs, if it occurs twice at least.
"""

from collections.abc import Iterator, Sequence
from functools import partial
import re

import numpy as np

from jaxlm.data import shingles
from jaxlm.data.cleaning import Dropped, Rule


def rule(
    *,
    lines: float = 0.3,
    paragraphs: float = 0.3,
    line_characters: float = 0.2,
    paragraph_characters: float = 0.2,
    frequent: Sequence[float] = (0.2, 0.18, 0.16),
    repeated: Sequence[float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1),
) -> Rule:
    """The largest share of repeated `lines` and `paragraphs`, of characters in them, in the most `frequent` n-gram
    (n = 2, 3, 4) and in all `repeated` n-grams (n = 5 to 10).
    """
    limits = (lines, line_characters, "lines", r"\n+"), (paragraphs, paragraph_characters, "paragraphs", r"\n\s*\n")
    return partial(_rule, limits=limits, frequent=tuple(frequent), repeated=tuple(repeated))


def _rule(text: str, limits: tuple, frequent: tuple[float, ...], repeated: tuple[float, ...]) -> str | Dropped:
    for reason, share, limit in _shares(text, limits, frequent, repeated):
        if share > limit:
            return Dropped(reason, f"{share:.0%} of the text, {limit:.0%} at most")
    return text


def _shares(text: str, limits: tuple, frequent: tuple, repeated: tuple) -> Iterator[tuple[str, float, float]]:
    """(reason, share, limit) of each rule, computed as they are asked for."""
    for by_number, by_characters, what, between in limits:
        parts = [part.strip() for part in re.split(between, text.strip())]
        seen: set[str] = set()
        again = [part for part in parts if part in seen or seen.add(part)]
        yield f"repeated {what}", len(again) / len(parts), by_number
        yield f"characters in repeated {what}", sum(map(len, again)) / max(1, sum(map(len, parts))), by_characters
    words = text.split()
    lengths = np.array([len(word) for word in words], np.int64)
    hashed = shingles.hash_words(words)
    for n, limit in enumerate(frequent, 2):
        yield f"most frequent {n}-gram", _covered(_most_frequent(hashed, lengths, n), lengths, n), limit
    for n, limit in enumerate(repeated, 5):
        yield f"repeated {n}-grams", _covered(_again(hashed, n), lengths, n), limit


def _most_frequent(hashed: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """Where the most frequent n-gram begins; of several the longest, of these the first."""
    grams = shingles.ngrams(hashed, n)
    _, first, inverse, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
    if not len(grams) or counts.max() < 2:
        return np.zeros(0, np.int64)
    ends = np.append(0, np.cumsum(lengths))
    best = min(np.flatnonzero(counts == counts.max()), key=lambda g: (ends[first[g]] - ends[first[g] + n], first[g]))
    return np.flatnonzero(inverse == best)


def _again(hashed: np.ndarray, n: int) -> np.ndarray:
    """Where n-grams begin that stood before."""
    grams = shingles.ngrams(hashed, n)
    return np.delete(np.arange(len(grams)), np.unique(grams, return_index=True)[1])


def _covered(starts: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The share of characters in the n words from each of `starts` on."""
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return float(lengths[np.cumsum(edges)[:-1] > 0].sum() / max(1, lengths.sum()))
