"""Length limits: documents that are too short or too long go, counted in characters and in words between blanks."""

from functools import partial

from jaxlm.data.cleaning import Dropped, Rule


def rule(
    *,
    min_characters: int = 1,
    max_characters: int | None = None,
    min_words: int = 0,
    max_words: int | None = None,
) -> Rule:
    """Each limit is itself allowed."""
    limits = (min_characters, max_characters, "characters"), (min_words, max_words, "words")
    return partial(_rule, limits=limits)


def _rule(text: str, limits: tuple[tuple[int, int | None, str], ...]) -> str | Dropped:
    for (low, high, unit), count in zip(limits, (len(text), len(text.split()))):
        if count < low:
            return Dropped(f"too few {unit}", f"{count:,} {unit}, {low:,} at least")
        if high is not None and count > high:
            return Dropped(f"too many {unit}", f"{count:,} {unit}, {high:,} at most")
    return text
