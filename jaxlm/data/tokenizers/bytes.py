"""UTF-8 bytes: ids 0-255 are the bytes, then pad 256, bos 257, eos 258, extra ones; "hé" is [104, 195, 169]."""

from collections.abc import Iterable, Sequence

from etils import epath

from jaxlm.data import tokenizers


class Tokenizer:
    """The same for every text."""

    pad, bos, eos = 256, 257, 258
    add_bos = add_eos = True

    def __init__(self, extra: Sequence[str] = ()):
        names = ["<pad>", "<s>", "</s>", *extra]
        self.specials = dict(zip(names, range(256, 256 + len(names))))
        self.vocab = 256 + len(names)
        self.fingerprint = tokenizers.fingerprint("bytes", 1, *extra)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def pieces(self) -> list[str]:
        return [chr(i) if i < 128 else "\ufffd" for i in range(256)] + [""] * len(self.specials)

    def size(self, token: int) -> int:
        return int(token < 256)

    def save(self, folder: epath.PathLike) -> None:
        tokenizers.save(self, folder, "bytes", {}, extra=list(self.specials)[3:])


def load(path: epath.Path, *, extra: Sequence[str] = ()) -> Tokenizer:
    """The bytes tokenizer; nothing is read."""
    return Tokenizer(extra)


def train(texts: Iterable[str], *, extra: Sequence[str] = ()) -> Tokenizer:
    """The bytes tokenizer; nothing is learnt from the texts."""
    return Tokenizer(extra)
