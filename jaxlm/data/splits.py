"""Training and validation text: whole documents held out, or the tail of each.

    Splitter("document", 0.05)    "abcdefghij" -> ("abcdefghij", "") or ("", "abcdefghij")
    Splitter("tail", 0.1)         "abcdefghij" -> ("abcdefghi", "j")

Whole documents are chosen by a hash of (seed, text), the text after cleaning: equal ones are on the same side, wherever
they stand. A document that comes in pieces is chosen by its first, as it was read: its pieces may be cleaned anywhere.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
from typing import NamedTuple

from jaxlm.data.sources import Document
from jaxlm.lookup import Mistake, key


class Marked(NamedTuple):
    """A document, and its side where that does not depend on its own text."""

    document: Document
    held_out: bool | None


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Parts documents into training and validation text; a fraction of `validation` is held out, 0 for none."""

    split: str
    validation: float
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.validation, int | float) or not 0 <= self.validation < 1:
            raise Mistake(f"config.prepare.validation is a fraction from 0 to below 1, not {self.validation!r}")
        key("config.prepare.split", self.split, dict(document=None, tail=None))

    def mark(self, documents: Iterable[Document]) -> Iterator[Marked]:
        """Give later pieces of a long document the side of the first; the documents must be in their order."""
        held_out = None
        for document in documents:
            if document.start == 0:
                whole = len(document.text) == document.total or self.split == "tail"
                held_out = None if whole else self._held_out(document.text)
            yield Marked(document, held_out)

    def parts(self, marked: Marked, text: str) -> tuple[str, str]:
        """Split a document's clean `text` (of its piece) in (training, validation). Pure; any process may do it."""
        document, held_out = marked
        if self.split == "document":
            held_out = self._held_out(text) if held_out is None else held_out
            return ("", text) if held_out else (text, "")
        cut = min(len(document.text), max(0, int((1 - self.validation) * document.total) - document.start))
        cut = cut * len(text) // len(document.text)
        return text[:cut], text[cut:]

    def _held_out(self, text: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}\n{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.validation * 2**64
