"""Training and validation text: whole documents held out, or the tail of each.

    Splitter("document", 0.05).parts(...)    "abcdefghij" -> ("abcdefghij", "") or ("", "abcdefghij")
    Splitter("tail", 0.1).parts(...)         "abcdefghij" -> ("abcdefghi", "j")

Whole documents are chosen by a hash of (seed, text): equal ones are on the same side, wherever they stand.
"""

from collections.abc import Iterable, Iterator
import hashlib

from jaxlm.data.sources import Document
from jaxlm.lookup import Mistake, key


class Splitter:
    """Parts documents into training and validation text; a fraction of `validation` is held out, 0 for none."""

    def __init__(self, split: str, validation: float, seed: int = 0):
        if not 0 <= validation < 1:
            raise Mistake(f"config.prepare.validation is a fraction from 0 to below 1, not {validation}")
        self.parts = key("config.prepare.split", split, dict(document=self._by_document, tail=self._by_tail))
        self.validation, self._seed = validation, seed

    def _by_document(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        held_out = False
        for document in documents:
            if document.start == 0:  # later pieces of a long document follow its first
                digest = hashlib.blake2b(f"{self._seed}\n{document.text}".encode(), digest_size=8).digest()
                held_out = int.from_bytes(digest) < self.validation * 2**64
            yield ("", document.text) if held_out else (document.text, "")

    def _by_tail(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        for document in documents:
            cut = max(0, int((1 - self.validation) * document.total) - document.start)
            yield document.text[:cut], document.text[cut:]
