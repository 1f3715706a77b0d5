"""Paraphrase: every sentence said otherwise by an encoder-decoder that was trained to.

    dict(name="paraphrase", model="runs/paraphrase", beams=4, copies=2)

The model writes sentence by sentence; copy i of a text is made of the i-th likeliest of each. The blanks between
sentences stay, and so does a sentence that the model cannot read (it is longer than its context) or has nothing for.
`prefix` is put before each, as T5 wants.
"""

from collections.abc import Callable
from functools import partial

from jaxlm.data import augmentation
from jaxlm.data.augmentation import Write, sentences


def rule(
    *, load: Callable[[str], Write], model: str, beams: int = 4, max_new_tokens: int = 128, prefix: str = ""
) -> augmentation.Rule:
    """Ask the model of the workdir `model` for the likeliest among `beams`, of at most `max_new_tokens` each."""
    write = partial(load(model), beams=beams, max_new_tokens=max_new_tokens)
    return lambda texts, rngs, copies: rewrite(texts, lambda parts: write([prefix + p for p in parts], copies), copies)


def rewrite(texts: list[str], write: Callable[[list[str]], list[list[str]]], copies: int) -> list[list[str]]:
    """The texts with each of their sentences replaced by what `write` has for it, the i-th in copy i."""
    split = [sentences(text) for text in texts]
    told = {part.strip(): None for parts in split for part in parts if part.strip()}  # each sentence once
    answers = dict(zip(told, write(list(told))))

    def version(part: str, copy: int) -> str:
        bare = part.strip()
        news = [new.strip() for new in answers.get(bare, ()) if new.strip()]
        return part if not news else part.replace(bare, news[min(copy, len(news) - 1)], 1)

    return [["".join(version(part, copy) for part in parts) for copy in range(copies)] for parts in split]
