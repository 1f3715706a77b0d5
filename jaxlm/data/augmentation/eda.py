"""Easy data augmentation (EDA, arXiv:1901.11196): one small operation on each sentence.

    a sad dog barks loudly     replace    a sorrowful dog barks loudly     words by synonyms
                               insert     a sad dog unhappy barks loudly   synonyms of words, anywhere
                               swap       a barks dog sad loudly           two words change places
                               delete     a sad barks loudly               words left out

A sentence of n words has max(1, alpha n) words replaced, inserted or swapped, or each left out with the chance alpha.
Synonyms come from a file, one group a line, parted by commas or tabs (`sad, unhappy, sorrowful`): no thesaurus comes
with jaxlm, and without a file sentences are swapped and deleted in alone. Only words in the file are replaced, so stop
words are those that it does not list; the signs around a word, and a capital at its beginning, stay.
"""

from collections.abc import Mapping, Sequence
from functools import partial
import re

import numpy as np

from jaxlm import lookup
from jaxlm.data import augmentation, files
from jaxlm.data.augmentation import joined, sentences, share, words
from jaxlm.lookup import Mistake

OPERATIONS = ("replace", "insert", "swap", "delete")


def rule(
    *, alpha: float = 0.1, synonyms: str | None = None, operations: Sequence[str] | None = None
) -> augmentation.Rule:
    """Change a share `alpha` of each sentence by one of `operations`, drawn evenly: all that there are synonyms for."""
    chosen = tuple(operations or (OPERATIONS if synonyms else OPERATIONS[2:]))
    for operation in chosen:
        lookup.key("eda: operations", operation, dict.fromkeys(OPERATIONS))
    if synonyms is None and (needy := [name for name in chosen if name in OPERATIONS[:2]]):
        raise Mistake(f"eda: the operation {needy[0]!r} needs synonyms=FILE, one group a line")
    table = _read(synonyms) if synonyms else {}
    return augmentation.singly(partial(_eda, alpha=share("eda: alpha", alpha), operations=chosen, synonyms=table))


def _read(path: str) -> dict[str, list[str]]:
    """Each word in lower case, and its synonyms."""
    found: dict[str, list[str]] = {}
    for name in files.match(path):
        with files.open(name) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    parts = re.split(r"[,\t]", line.decode())
                except UnicodeDecodeError as e:
                    raise Mistake(f"eda: synonyms={path}: {name}, line {number} is not UTF-8 ({e})") from None
                group = [word.strip() for word in parts if word.strip()]
                for word in group:
                    known = found.setdefault(word.lower(), [])
                    known += [other for other in group if other.lower() != word.lower() and other not in known]
    if not any(found.values()):
        raise Mistake(f"eda: synonyms={path}: no line holds two words, parted by commas or tabs")
    return {word: others for word, others in found.items() if others}


def _eda(
    text: str,
    rng: np.random.Generator,
    *,
    alpha: float,
    operations: tuple[str, ...],
    synonyms: Mapping[str, list[str]],
) -> str:
    out = []
    for sentence in sentences(text):
        found, gaps = words(sentence)
        if not found:
            out.append(sentence)
            continue
        times = max(1, int(alpha * len(found)))
        match operations[rng.integers(len(operations))]:
            case "swap":
                for _ in range(times):
                    i, j = rng.integers(len(found), size=2).tolist()
                    found[i], found[j] = found[j], found[i]
            case "delete":
                kept = np.flatnonzero(rng.random(len(found)) >= alpha).tolist() or [int(rng.integers(len(found)))]
                inner = [gaps[i + 1] for i in kept[:-1]]
                found, gaps = [found[i] for i in kept], [gaps[0], *inner, gaps[-1]]
            case operation:
                cores = [_core(word) for word in found]
                able = [i for i, (_, core, _) in enumerate(cores) if core.lower() in synonyms]
                for i in rng.permutation(able)[:times].tolist():
                    before, core, after = cores[i]
                    others = synonyms[core.lower()]
                    new = others[rng.integers(len(others))]
                    if operation == "insert":
                        at = int(rng.integers(len(found)))
                        found[at] = f"{new} {found[at]}"
                    else:
                        found[i] = before + (new[:1].upper() + new[1:] if core[0].isupper() else new) + after
        out.append(joined(found, gaps))
    return "".join(out)


def _core(word: str) -> tuple[str, str, str]:
    """The signs before a word, the word, and those after it."""
    match = re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL)
    assert match is not None
    return match[1], match[2], match[3]
