"""Quality rules of Gopher (arXiv:2112.11446, A.1.1): what reads like prose stays.

Words stand between blanks. The defaults are the paper's; the function words are English (`function_words=0` for text in
other languages).
"""

from collections import Counter
from functools import partial
from typing import NamedTuple

from jaxlm.data.cleaning import Dropped, Rule

FUNCTION_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "▪", "●", "◦", "-", "*")
ELLIPSES = ("...", "…")


class Limits(NamedTuple):
    """See `rule`."""

    min_words: int
    max_words: int
    min_length: float
    max_length: float
    symbols: float
    bullets: float
    ellipses: float
    alphabetic: float
    function_words: int


def rule(
    *,
    min_words: int = 50,
    max_words: int = 100_000,
    min_length: float = 3,
    max_length: float = 10,
    symbols: float = 0.1,
    bullets: float = 0.9,
    ellipses: float = 0.3,
    alphabetic: float = 0.8,
    function_words: int = 2,
) -> Rule:
    """`min_length` and `max_length` bound the mean length of a word; at most so many `symbols` ("#" or ellipses) come
    on a word, this share of lines begins with `bullets` and that ends in `ellipses`; at least this share of words holds
    an `alphabetic` character, and so many of the eight `function_words` occur.
    """
    limits = Limits(
        min_words, max_words, min_length, max_length, symbols, bullets, ellipses, alphabetic, function_words
    )
    return partial(_rule, limits=limits)


def _rule(text: str, limits: Limits) -> str | Dropped:
    words = text.split()
    if len(words) < limits.min_words:
        return Dropped("too few words", f"{len(words):,} words, {limits.min_words:,} at least")
    if len(words) > limits.max_words:
        return Dropped("too many words", f"{len(words):,} words, {limits.max_words:,} at most")
    if not words:
        return text
    length = sum(map(len, words)) / len(words)
    if not limits.min_length <= length <= limits.max_length:
        return Dropped("word length", f"{length:.1f} on average, {limits.min_length} to {limits.max_length}")
    for reason, count, limit in [
        ("hash signs", text.count("#"), limits.symbols),
        ("ellipses", sum(map(text.count, ELLIPSES)), limits.symbols),
    ]:
        if count > limit * len(words):
            return Dropped(reason, f"{count / len(words):.2f} a word, {limit} at most")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for reason, count, limit in [
        ("bullets", sum(line.startswith(BULLETS) for line in lines), limits.bullets),
        ("lines end in ellipses", sum(line.endswith(ELLIPSES) for line in lines), limits.ellipses),
    ]:
        if count > limit * len(lines):
            return Dropped(reason, f"{count / len(lines):.0%} of lines, {limit:.0%} at most")
    times = Counter(words)
    alphabetic = sum(n for word, n in times.items() if any(map(str.isalpha, word))) / len(words)
    if alphabetic < limits.alphabetic:
        return Dropped("not alphabetic", f"{alphabetic:.0%} of words, {limits.alphabetic:.0%} at least")
    found = len(FUNCTION_WORDS & {word.strip('.,;:!?"()').lower() for word in times})
    if found < limits.function_words:
        return Dropped("no function words", f"{found} of them, {limits.function_words} at least")
    return text
