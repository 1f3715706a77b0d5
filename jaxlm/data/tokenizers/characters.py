"""Characters: the sorted set of those in the training text, and no specials, so that tinyshakespeare has exactly 65.

    tok = train(["hello"])        vocab 4:  e 0, h 1, l 2, o 3
    tok.encode("hole")            [1, 3, 2, 0]

A document is its characters and nothing else: no bos, no eos. Specials that are asked for come after the characters.
"""

from collections.abc import Iterable, Sequence
import json

from etils import epath

from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake

CHARACTERS = "characters.json"


class Tokenizer:
    """`unknown` stands for characters that are not in the alphabet; without it they are a `Mistake`."""

    bos = eos = pad = None
    add_bos = add_eos = False

    def __init__(self, alphabet: str, unknown: str | None = None, extra: Sequence[str] = ()):
        self._alphabet, self._unknown = alphabet, unknown
        self._ids = {character: i for i, character in enumerate(alphabet)}
        self.specials = {name: len(alphabet) + i for i, name in enumerate(extra)}
        self.vocab = len(alphabet) + len(extra)
        self.fingerprint = tokenizers.fingerprint(alphabet, unknown, *extra)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as e:
            if self._unknown is None:
                raise Mistake(
                    f"the character {e.args[0]!r} is not among the {self.vocab} of the training text; train with "
                    f'tokenizer.unknown="?" (one character for all such), or use tokenizer.kind="bytes"'
                ) from None
        unknown = self._ids[self._unknown]
        return [self._ids.get(character, unknown) for character in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._alphabet[i] for i in ids if i < len(self._alphabet))

    def pieces(self) -> list[str]:
        return [*self._alphabet, *[""] * len(self.specials)]

    def size(self, token: int) -> int:
        return len(self.decode([token]).encode())

    def save(self, folder: epath.PathLike) -> None:
        files = {CHARACTERS: json.dumps(self._alphabet, ensure_ascii=False).encode()}
        tokenizers.save(self, folder, "characters", files, unknown=self._unknown, extra=list(self.specials))


def load(path: epath.Path, *, unknown: str | None = None, extra: Sequence[str] = ()) -> Tokenizer:
    """Load a folder that `save` wrote."""
    if not (path / CHARACTERS).exists():
        raise Mistake(f"no {CHARACTERS} in {path}")
    return Tokenizer(json.loads((path / CHARACTERS).read_bytes()), unknown, extra)


def train(texts: Iterable[str], *, unknown: str | None = None, extra: Sequence[str] = ()) -> Tokenizer:
    """Collect the characters of all texts. A character given as `unknown` is added, and stands for every other one."""
    if unknown is not None and len(unknown) != 1:
        raise Mistake(f"tokenizer.unknown is one character, not {unknown!r}")
    alphabet = set(unknown or "")
    for text in texts:
        alphabet.update(text)
    return Tokenizer("".join(sorted(alphabet)), unknown, extra)
