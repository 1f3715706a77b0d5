"""Language identification by py3langid: documents in other languages than those wanted go.

It is judged by the beginning of a text; what holds no letters is uncertain.
"""

from collections.abc import Sequence
from functools import cache, partial

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from jaxlm.data.cleaning import Dropped, Rule
from jaxlm.lookup import Mistake, key

LIBRARY = "py3langid"


def rule(*, keep: Sequence[str], confidence: float = 0.5, characters: int = 2_000) -> Rule:
    """`keep` lists languages by their ISO 639 codes; the best one must have a probability of `confidence` at least,
    seen in the first so many `characters`.
    """
    where = "config.prepare.clean: language"
    if isinstance(keep, str) or not keep:
        raise Mistake(f'{where}.keep is a list of ISO 639 codes, for example ["en"], not {keep!r}')
    known = {label: label for label in _identifier().labels}
    wanted = frozenset(key(f"{where}.keep", code, known) for code in keep)
    return partial(_rule, wanted=wanted, confidence=confidence, characters=characters)


def _rule(text: str, wanted: frozenset[str], confidence: float, characters: int) -> str | Dropped:
    language, probability = _identifier().classify(text[:characters])
    detail = f"{language} with probability {probability:.2f}"
    if probability < confidence:
        return Dropped("uncertain", detail)
    return text if language in wanted else Dropped(language, detail)


@cache
def _identifier() -> LanguageIdentifier:
    """One for each process: it takes two seconds to load."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
