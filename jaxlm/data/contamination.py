"""Decontamination: training text that shares a long run of words with a named evaluation set is dropped.

    rule = contamination({"squad": "jsonl:squad/test.jsonl.gz?field=context"}, ngram=13)
    rule("... 13 words in a row that stand in squad ...")      Dropped("squad", "13 words in a row")

It is the last of `jaxlm.data.cleaning`'s rules: it sees the clean text, and is counted by set. So the sets are read as
they are and, where the other rules change them, as those leave them: an address that has become <email> here is one in
the set, too. Words are compared as `jaxlm.data.shingles` normalises them; each n-gram of the sets costs 8 bytes in
every worker. Texts of fewer words than `ngram` cannot be recognised; the manifest says how many each set has. What goes
is in neither split.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxlm.data import shingles
from jaxlm.data import sources as source_kinds
from jaxlm.data.cleaning import Dropped
from jaxlm.lookup import Mistake


@dataclasses.dataclass(frozen=True, eq=False)
class Contamination:
    """Named sets of n-gram hashes, each uint64 and sorted; where one is in several sets it counts for the first."""

    grams: Mapping[str, np.ndarray]
    ngram: int
    recipe: Mapping[str, Any]

    def __call__(self, text: str) -> str | Dropped:
        found = np.unique(shingles.hashes(text, self.ngram))
        for name, grams in self.grams.items():
            if shared := int(np.isin(found, grams, assume_unique=True).sum()):
                return Dropped(name, f"{shared:,} runs of {self.ngram} words")
        return text


def contamination(
    sources: Mapping[str, str], *, ngram: int = 13, clean: Callable[[str], str | None] = lambda text: text
) -> Contamination:
    """Read the evaluation sets (name -> source spec); `clean` is what becomes of training text, None where it is
    dropped. Raises `Mistake` for a set that cannot be, or has no n-gram.
    """
    if ngram < 1:
        raise Mistake(f"config.prepare.decontaminate.ngram={ngram} is a number of words, 1 at least")
    grams, inputs = {}, {}
    for name, source in {name: source_kinds.find(spec) for name, spec in sources.items()}.items():
        found, short = [], 0
        for document in source.read():
            found.append(shingles.hashes(document.text, ngram))
            short += not len(found[-1])
            text = clean(document.text)
            if text is not None and text != document.text:
                found.append(shingles.hashes(text, ngram))
        grams[name] = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))
        inputs[name] = dict(source=sources[name], inputs=dict(source.inputs), short=short)
        if not len(grams[name]):
            raise Mistake(f"config.prepare.decontaminate: no text of {name} has {ngram} words, so none would be found")
    return Contamination(grams, ngram, dict(ngram=ngram, sources=inputs))
