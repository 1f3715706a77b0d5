"""Back-translation (arXiv:1511.06709): into another language and back, by two encoder-decoders.

    dict(name="translate", there="runs/en-de", back="runs/de-en", beams=4, copies=2)

As for `paraphrase`, sentence by sentence: the likeliest translation there, and the `copies` likeliest back.
"""

from collections.abc import Callable

from jaxlm.data import augmentation
from jaxlm.data.augmentation import Write
from jaxlm.data.augmentation.paraphrase import rewrite


def rule(
    *,
    load: Callable[[str], Write],
    there: str,
    back: str,
    beams: int = 4,
    max_new_tokens: int = 128,
    prefixes: tuple[str, str] = ("", ""),
) -> augmentation.Rule:
    """Ask the models of the workdirs `there` and `back`; `prefixes` are put before what each is given, as T5 wants."""
    models, how = (load(there), load(back)), dict(beams=beams, max_new_tokens=max_new_tokens)

    def both(parts: list[str], copies: int) -> list[list[str]]:
        abroad = [[*found, ""][0].strip() for found in models[0]([prefixes[0] + p for p in parts], 1, **how)]
        said = [text for text in abroad if text]
        home = iter(models[1]([prefixes[1] + text for text in said], copies, **how))
        return [next(home) if text else [] for text in abroad]

    return lambda texts, rngs, copies: rewrite(texts, lambda parts: both(parts, copies), copies)
