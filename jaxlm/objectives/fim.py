"""Fill in the middle: a decoder learns to write what stands between two texts (arXiv:2207.14255).

    a document     [1 5 6 7 8 2]                bos 1, eos 2; <fim_prefix> P, <fim_suffix> S, <fim_middle> M
    cut in three   5 | 6 7 | 8                  at two places, any as likely as any other; a part may be empty
    PSM            [1 P 5 S 8 M 6 7 2]          prefix, suffix, middle
    SPM            [1 P S 8 M 5 6 7 2]          suffix, then prefix and middle as one text

Each document of a row is cut with probability `rate`, of these `spm` as SPM, and the loss is over all tokens, the
three specials too, as for any text. eos is the end of the middle, so a document that ends with its row, and not by
itself, has one, too. What a single document gains finds room in its row; of several, the longest give up as much of
their outer ends. With config.data.isolate=False all documents of a row are cut as one.

`level="character"` cuts inside of tokens, too, and spells each part by itself, as it will be when somebody asks. Where
that would not give the text again (WordPiece, a row that begins inside of a character), the document is cut between
tokens, as all are by `level="token"`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxlm.data.words import Words
from jaxlm.lookup import Mistake, key
from jaxlm.objectives import _pairs, clm
from jaxlm.objectives.clm import loss as loss

KINDS = ("decoder",)
EXACT = False

NAMES = {part: (f"<fim_{part}>", f"<|fim_{part}|>", f"<{part[:3].upper()}>") for part in ("prefix", "suffix", "middle")}
LEVELS = dict(character="character", token="token")


def row(length: int, words: Words, *, rate: float = 0.5, spm: float = 0.5, level: str = "character") -> int:
    """What leaves room for the three specials of one document, and an eos that it may lack."""
    _pairs.eos(words)
    for name, value in dict(rate=rate, spm=spm).items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise Mistake(f"config.objective.{name}={value!r}: a share of the documents, from 0 to 1")
    key("config.objective.level", level, LEVELS)
    for part, names in NAMES.items():
        words.find(f"fim {part}", names)
    if length < 8:
        raise Mistake(f"config.length={length} is too short to fill in a middle")
    return length + 1 - 4


def features(
    row: Mapping[str, np.ndarray], rng: np.random.Generator, words: Words, length: int, *, rate: float = 0.5,
    spm: float = 0.5, level: str = "character",
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row -> the example of a causal model, some of its documents cut in three."""
    marks = [words.find(f"fim {part}", names) for part, names in NAMES.items()]
    documents = [_Document.of(part, words) for part in _pairs.pieces(row)]
    for document in documents:
        if rng.random() < rate:
            document.cut(rng, words, marks, level, spm)
    over = sum(map(len, documents)) - (length + 1)
    for document in sorted(documents, key=len, reverse=True):
        over -= document.shorten(over) if over > 0 else 0
    packed = {name: np.zeros(length + 1, np.int32) for name in ("tokens", "segments")}
    tokens = np.array([token for document in documents for token in document.tokens()], np.int32)[: length + 1]
    numbers = np.repeat(np.arange(1, len(documents) + 1), [len(document) for document in documents])[: length + 1]
    packed["tokens"][: len(tokens)], packed["segments"][: len(tokens)] = tokens, numbers
    return clm.features(packed)


@dataclasses.dataclass
class _Document:
    """Its parts, each token in one of them; all of its text is `prefix` until it is cut."""

    front: list[int]
    prefix: list[int]
    suffix: list[int]
    middle: list[int]
    end: list[int]
    marks: list[int] | None = None  # of prefix, suffix and middle
    spm: bool = False

    @classmethod
    def of(cls, tokens: np.ndarray, words: Words) -> "_Document":
        first, last = int(tokens[0] == words.bos), len(tokens) - int(tokens[-1] == words.eos)
        first, last = min(first, last), max(first, last)
        return cls(
            *(part.tolist() for part in (tokens[:first], tokens[first:last], tokens[:0], tokens[:0], tokens[last:]))
        )

    def cut(self, rng: np.random.Generator, words: Words, marks: list[int], level: str, spm: float) -> None:
        """Draw two places, and whether the suffix comes first."""
        self.spm, self.marks, self.end = bool(rng.random() < spm), marks, [_pairs.eos(words)]
        places = rng.random(2)
        parts = _spelled(self.prefix, places, words) if level == "character" else None
        self.prefix, self.middle, self.suffix = parts or _split(self.prefix, places)

    def shorten(self, tokens: int) -> int:
        """Take so many from the end of the suffix and the beginning of the prefix; how many there were."""
        before = len(self)
        keep = max(len(self.suffix) - tokens, 0)
        rest = tokens - (len(self.suffix) - keep)
        self.suffix, self.prefix = self.suffix[:keep], self.prefix[rest:]
        return before - len(self)

    def tokens(self) -> list[int]:
        if self.marks is None:
            return [*self.front, *self.prefix, *self.end]
        pre, suf, mid = self.marks
        if self.spm:
            text = [pre, suf, *self.suffix, mid, *self.prefix, *self.middle]
        else:
            text = [pre, *self.prefix, suf, *self.suffix, mid, *self.middle]
        return [*self.front, *text, *self.end]

    def __len__(self) -> int:
        return len(self.tokens())


def _split(text: Any, places: np.ndarray) -> list[Any]:
    """A text cut before any two of its signs, or behind the last; `places` are two numbers from 0 to 1."""
    first, last = sorted((places * (len(text) + 1)).astype(int))
    return [text[:first], text[first:last], text[last:]]


def _spelled(tokens: list[int], places: np.ndarray, words: Words) -> list[list[int]] | None:
    """The ids of a text's three parts, cut between any two characters; None where they are not the text again."""
    if words.tokenizer is None or words.special_V[tokens].any():
        return None
    text = words.tokenizer.decode(tokens)
    parts = [words.tokenizer.encode(part) for part in _split(text, places)]
    again = words.tokenizer.decode([token for part in parts for token in part])
    return parts if again == text and words.tokenizer.encode(text) == tokens else None
