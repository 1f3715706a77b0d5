"""Word-level noise: a share of the words gets a typo, or loses a letter, its case, or the blank behind it.

    the weather today     thr weather today       key: a letter's neighbour on a keyboard
                          teh weather today       transpose: two letters change places
                          the weathr today        drop: a letter is missing
                          the weatherr today      repeat: a letter comes twice
                          THE weather today       case: a word in the other case
                          the weathertoday        space: the blank behind a word is missing or comes twice
                          the today               word: a word is missing

Whatever is left alone stays as it is, to the last tab.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from jaxlm import lookup
from jaxlm.data import augmentation
from jaxlm.data.augmentation import joined, share, words

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEYS = {  # a letter's neighbours: on either side, above and below
    row[at]: row[max(at - 1, 0) : at] + row[at + 1 : at + 2] + above[at : at + 1] + below[at : at + 1]
    for above, row, below in zip(("", *_ROWS), _ROWS, (*_ROWS[1:], ""))
    for at in range(len(row))
}
KINDS = ("key", "transpose", "drop", "repeat", "case", "space", "word")


def rule(*, rate: float = 0.05, kinds: Sequence[str] = KINDS) -> augmentation.Rule:
    """Touch a share `rate` of the words, each with one of `kinds`, drawn evenly."""
    for kind in kinds:
        lookup.key("noise: kinds", kind, dict.fromkeys(KINDS))
    if not kinds:
        raise lookup.Mistake(f"noise: kinds is empty; choose from {', '.join(KINDS)}")
    return augmentation.singly(partial(_noise, rate=share("noise: rate", rate), kinds=tuple(kinds)))


def _noise(text: str, rng: np.random.Generator, *, rate: float, kinds: tuple[str, ...]) -> str:
    found, gaps = words(text)
    for i in np.flatnonzero(rng.random(len(found)) < rate).tolist():
        word, at = found[i], int(rng.integers(len(found[i])))
        match kinds[rng.integers(len(kinds))]:
            case "key":
                found[i] = word[:at] + _beside(word[at], rng) + word[at + 1 :]
            case "transpose" if at > 0:
                found[i] = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
            case "drop" if len(word) > 1:
                found[i] = word[:at] + word[at + 1 :]
            case "repeat":
                found[i] = word[: at + 1] + word[at:]
            case "case":
                found[i] = word.upper() if word.islower() else word.lower()
            case "space" if i + 1 < len(found) and "\n" not in gaps[i + 1]:
                gaps[i + 1] = "" if rng.random() < 0.5 else gaps[i + 1] + gaps[i + 1][-1]
            case "word" if len(found) > 1:
                blanks = gaps[i : i + 2] if i else gaps[:1]  # of two that would meet, the one that ends a line
                found[i], gaps[i], gaps[i + 1] = "", "", max(blanks, key=lambda blank: blank.count("\n"))
    return joined(found, gaps)


def _beside(letter: str, rng: np.random.Generator) -> str:
    near = _KEYS.get(letter.lower(), letter)
    chosen = near[rng.integers(len(near))]
    return chosen.upper() if letter.isupper() else chosen
