"""Texts as sets of word n-grams: what near-duplicates and contaminated documents have in common.

    words("The Cat, the mat.")          [the, cat, the, mat]          case, punctuation and white space do not count
    hashes("The Cat, the mat.", 2)      uint64[3]                     of "the cat", "cat the", "the mat"

In scripts that write no spaces between words (Chinese, Japanese, Thai ...) each sign is a word of its own.
"""

import re
import unicodedata

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

# Thai, Lao, Myanmar, Khmer; kana and ideographs, their extensions and compatibility forms
SIGNS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
ASCII_WORD = re.compile(r"\w+", re.ASCII)
WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+")


def words(text: str) -> list[str]:
    """The words of a text, normalised (NFKC) and in lower case."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())  # the same, in 0.6 of the time
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def hashes(text: str, n: int) -> np.ndarray:
    """Hash each n-gram of a text's words, in their order: uint64[words - n + 1]; none for a text of fewer words.

    The same on every machine and in every process.
    """
    return ngrams(hash_words(words(text)), n)


def hash_words(found: list[str]) -> np.ndarray:
    """Hash words one by one: uint64[words]."""
    return _mix(np.array(RMinHash.hash_token_sets([found])[0], np.uint64))


def ngrams(words_T: np.ndarray, n: int) -> np.ndarray:
    """Hash the n-grams of hashed words: uint64[T - n + 1]."""
    mixed = np.zeros(max(0, len(words_T) - n + 1), np.uint64)
    for i in range(n):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words_T[i : i + len(mixed)]
    return _mix(mixed)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the input sways every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
