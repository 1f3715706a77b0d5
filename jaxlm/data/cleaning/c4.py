"""Rules of C4 (arXiv:1910.10683, 2.2): lines that are sentences stay, pages of code and placeholders go.

Not here: C4 also removes spans of three sentences that occur elsewhere in the corpus; see `jaxlm.data.dedup`.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
import re

from jaxlm.data.cleaning import Changed, Dropped, Rule

CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]", re.IGNORECASE)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def rule(
    *,
    min_words: int = 5,
    min_sentences: int = 3,
    ends: str = '.!?"”',
    javascript: bool = True,
    policies: bool = True,
    citations: bool = True,
    braces: bool = True,
    lorem_ipsum: bool = True,
    banned: Sequence[str] = (),
) -> Rule:
    """Lines go that have fewer than `min_words`, end in no mark of `ends` (or in an ellipsis), speak of Javascript or
    of `policies`; marks of `citations` ([1], [edit]) go. Documents go that hold `braces`, "lorem ipsum" or a `banned`
    word or phrase, or that keep fewer than `min_sentences`. Each may be turned off (`ends=""`).
    """
    unwanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(banned)))})\b", re.IGNORECASE) if banned else None
    lines = partial(_line, min_words=min_words, ends=tuple(ends), javascript=javascript, policies=policies)
    sentence = re.compile(rf"[{re.escape(ends or '.!?')}]+(?=\s|$)")
    whole = ("{",) * braces + ("lorem ipsum",) * lorem_ipsum
    return partial(
        _rule, line=lines, whole=whole, unwanted=unwanted, citations=citations, sentence=sentence, least=min_sentences
    )


def _rule(
    text: str,
    line: partial,
    whole: tuple[str, ...],
    unwanted: re.Pattern | None,
    citations: bool,
    sentence: re.Pattern,
    least: int,
) -> Changed | Dropped:
    lowered = text.lower()
    for sign in whole:
        if sign in lowered:
            return Dropped("brace" if sign == "{" else sign)
    if unwanted and (found := unwanted.search(text)):
        return Dropped("banned word", repr(found[0]))
    counts: Counter[str] = Counter()
    if citations:
        text, counts["citation"] = CITATION.subn("", text)
    kept = []
    for part in text.split("\n"):
        if not part.strip() or not (reason := line(part.strip())):
            kept.append(part)
        else:
            counts[reason] += 1
    left = "\n".join(kept).strip("\n") if len(kept) < text.count("\n") + 1 else text
    if (sentences := len(sentence.findall(left))) < least:
        return Dropped("too few sentences", f"{sentences} are left, {least} at least")
    return Changed(left, +counts)


def _line(line: str, min_words: int, ends: tuple[str, ...], javascript: bool, policies: bool) -> str | None:
    """Why a line goes, None for one that stays."""
    if ends and (not line.endswith(ends) or line.endswith(("...", "…"))):
        return "line ends in no mark"
    if len(line.split()) < min_words:
        return "short line"
    lowered = line.lower()
    if javascript and "javascript" in lowered:
        return "line on Javascript"
    if policies and any(policy in lowered for policy in POLICIES):
        return "line on policies"
    return None
