"""UTF-8 bytes: ids 0-255 are the bytes, then pad 256, bos 257, eos 258; "hé" is [104, 195, 169]."""

from collections.abc import Iterable

from etils import epath

from jaxlm.data import tokenizers


class Tokenizer:
    """The same for every text."""

    vocab, pad, bos, eos = 259, 256, 257, 258
    add_bos = add_eos = True
    fingerprint = tokenizers.fingerprint("bytes", 1)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: epath.PathLike) -> None:
        tokenizers.save(self, folder, "bytes", {})


def load(path: epath.Path) -> Tokenizer:
    """The bytes tokenizer; nothing is read."""
    return Tokenizer()


def train(texts: Iterable[str]) -> Tokenizer:
    """The bytes tokenizer; nothing is learnt from the texts."""
    return Tokenizer()
