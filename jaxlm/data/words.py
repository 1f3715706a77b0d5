"""What objectives know of a tokenizer: which ids are special, and where words begin.

words = Words.of(tokenizer)
words.special_V[5]                              whether 5 stands for no text: never masked, never drawn at random
words.begins([2, 71, 9, 12])                    [True  True  False  True]
words.find("mask", MASK)                        the id of the first of these names that the tokenizer has
words.sentinels                                 those of <extra_id_0>, <extra_id_1>, ... of T5 and UL2

In scripts without blanks, such as Chinese and Thai, each piece is a word. Where they are spelt in bytes, a word would
have no end: what is longer than LONGEST tokens is one every three tokens, the bytes of a character.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import re
import unicodedata

import numpy as np

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.lookup import Mistake

MASK = ("<mask>", "[MASK]")
LONGEST, CHARACTER = 20, 3  # tokens
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """Tables over the vocabulary, bool[V], and the specials by name."""

    special_V: np.ndarray
    opens_V: np.ndarray  # the piece begins with a sign that is no letter, digit or part of one: a blank, a comma
    closes_V: np.ndarray  # it ends with one
    stops_V: np.ndarray  # a sentence may end with it: a full stop, a question or exclamation mark, blanks aside
    specials: Mapping[str, int]
    bos: int | None
    eos: int | None
    pad: int  # what fills up a row; where the tokenizer has none, 0
    known: bool = True
    tokenizer: Tokenizer | None = None  # to spell a part of a token

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        pieces = tokenizer.pieces()
        special = np.asarray([not piece for piece in pieces])
        opens = np.asarray([not piece or not _inside(piece[0]) for piece in pieces])
        closes = np.asarray([not piece or not _inside(piece[-1]) for piece in pieces])
        stops = np.asarray([piece.rstrip().endswith((".", "?", "!")) for piece in pieces])
        ends = tokenizer.bos, tokenizer.eos, tokenizer.pad or 0
        return cls(special, opens, closes, stops, tokenizer.specials, *ends, tokenizer=tokenizer)

    @classmethod
    def of_size(cls, vocab: int) -> "Words":
        """Stands in for a tokenizer that is not at hand, where shapes alone matter: every special sought is there."""
        return cls(*np.zeros((4, vocab), bool), specials={}, bos=0, eos=0, pad=0, known=False)

    @property
    def vocab(self) -> int:
        return len(self.special_V)

    @functools.cached_property
    def sentinels(self) -> list[int]:
        """The ids of <extra_id_0>, <extra_id_1>, ... in this order; there may be none."""
        found = {int(m[1]): i for name, i in self.specials.items() if (m := re.fullmatch(r"<extra_id_(\d+)>", name))}
        return [found[i] for i in sorted(found)] if self.known else [0] * 1000

    def find(self, what: str, names: Iterable[str]) -> int:
        """The id of the first of `names` that is a special here; raises `Mistake` for none."""
        names = list(names)
        if not self.known:
            return 0
        for name in names:
            if name in self.specials:
                return self.specials[name]
        has = ", ".join(map(repr, self.specials)) or "none"
        raise Mistake(
            f"the tokenizer has no {what} token ({' or '.join(map(repr, names))}; its specials: {has}). Train it with "
            f"config.prepare.tokenizer.extra=[{names[0]!r}]"
        )

    def begins(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token begins a word, bool[T]: it opens one, what stands before it has closed one, or the word
        would be too long.
        """
        tokens = np.asarray(tokens)
        before = np.append(True, self.closes_V[tokens[:-1]])[: len(tokens)]
        begins = self.opens_V[tokens] | before
        starts = np.flatnonzero(begins)
        sizes = np.diff(np.append(starts, len(tokens)))
        within = np.arange(len(tokens)) - np.repeat(starts, sizes)
        return begins | (np.repeat(sizes, sizes) > LONGEST) & (within % CHARACTER == 0)


def _inside(sign: str) -> bool:
    """Whether a word can have this sign beside another one of its own: a letter with its marks, a digit or a part."""
    kind = unicodedata.category(sign)[0]
    return sign in "_\ufffd" or kind in "MN" or (kind == "L" and not UNSPACED.match(sign))
