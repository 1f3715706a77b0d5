"""Tokenizers: one file a kind, each with `train(texts, ...)`, `load(path, ...)` and a `Tokenizer`.

    tok = train(texts, dict(kind="sentencepiece", algorithm="bpe", vocab=2048))
    tok.encode("def f(x):")                        [5, 871, 29, ...]      the text only; the caller adds bos and eos
    tok.decode(tok.encode(text)) == text           to the last tab and newline, WordPiece excepted
    tok.save("store/tokenizer");  load("store/tokenizer");  load("gpt2/");  load("some.model")

`Tokenizer` says what each of them offers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
import itertools
import json
import re
from typing import Any, Protocol

from etils import epath
import numpy as np

from jaxlm import lookup
from jaxlm.data.cut import cut
from jaxlm.lookup import Mistake

# The module `bytes` of this folder takes that name here once it is imported, so nothing below may use the builtin.

FILES = ("tokenizer.json", "*.model")  # how others name a tokenizer's file, the preferred first
CONFIG = "tokenizer_config.json"  # beside such a file: the names of its specials
SPEC = "spec.json"  # beside a saved tokenizer's own files: which kind it is, and how to load it again


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def vocab(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def pad(self) -> int | None: ...
    @property
    def specials(self) -> Mapping[str, int]: ...  # by name, all tokens that no text is turned into
    @property
    def add_bos(self) -> bool: ...  # whether a stored document begins with bos
    @property
    def add_eos(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...  # equal for tokenizers that give equal ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without specials."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text again; specials leave no trace."""
        ...

    def pieces(self) -> list[str]:
        """The text that each id stands for inside a text, with the blank before a word; "" for specials.

        What is a part of a character alone is written as "�".
        """
        ...

    def size(self, token: int) -> int:
        """UTF-8 bytes of the text that a token stands for where a text begins with it; 0 for specials."""
        ...

    def save(self, folder: epath.PathLike) -> None:
        """Write what `load(folder)` needs to give this tokenizer again."""
        ...


def load(source: epath.PathLike | Mapping[str, Any]) -> Tokenizer:
    """Load a saved tokenizer, a Hugging Face folder, a .model or .json file, or `dict(kind=..., path=..., ...)`.

    What others published adds bos and eos to a text as it does in transformers; loaded by its kind, to prepare
    documents with, it adds both unless told otherwise. Raises `Mistake` when nothing there is a tokenizer.
    """
    if isinstance(source, Mapping):
        options = dict(source)
        kind, path = options.pop("kind"), options.pop("path")
        return lookup.spend(f"tokenizer {kind!r} with a path", _kind(kind).load, options, epath.Path(path))
    path = epath.Path(source)
    if not path.exists():
        raise Mistake(f"no tokenizer at {path}: nothing is there")
    if (path / SPEC).exists():
        spec = json.loads((path / SPEC).read_text())
        return _kind(spec["kind"]).load(path, **spec["load"])
    file = path if path.is_file() else find(path)
    if file is None or file.suffix not in (".json", ".model"):
        raise Mistake(f"no tokenizer at {path}: looked for {SPEC}, {', '.join(FILES)}")
    kind = "huggingface" if file.suffix == ".json" else "sentencepiece"
    return _kind(kind).load(file, add_bos=None, add_eos=None)


def find(folder: epath.PathLike) -> epath.Path | None:
    """The file of a Hugging Face folder's tokenizer; None where it has none that is known here."""
    return next((file for pattern in FILES for file in sorted(epath.Path(folder).glob(pattern))), None)


def config(folder: epath.Path) -> dict[str, Any]:
    """What a Hugging Face folder's tokenizer_config.json says, each token by its name; empty where there is none."""
    file = folder / CONFIG
    said = json.loads(file.read_text()) if file.exists() else {}
    return {key: x["content"] if isinstance(x, dict) and "content" in x else x for key, x in said.items()}


def train(texts: Iterable[str], spec: Mapping[str, Any]) -> Tokenizer:
    """Train a tokenizer on `texts`: `spec` is its kind and its training options, as in `config.prepare.tokenizer`.

    Each kind takes `extra`: names of specials that objectives need, such as "<mask>" or "<extra_id_0>".
    """
    options = dict(spec)
    if "kind" not in options:
        raise Mistake(f"a tokenizer needs a kind, one of: {', '.join(lookup.names(__name__))}")
    kind = options.pop("kind")
    return lookup.spend(f"tokenizer {kind!r}", _kind(kind).train, options, texts)


class Named:
    """A tokenizer of texts in which specials stand by their names: "the <extra_id_0> of", as id and back."""

    def __init__(self, tokenizer: Tokenizer):
        self._plain = tokenizer
        self.vocab, self.bos, self.eos, self.pad = tokenizer.vocab, tokenizer.bos, tokenizer.eos, tokenizer.pad
        self.specials, self.fingerprint = tokenizer.specials, tokenizer.fingerprint
        self.add_bos, self.add_eos = tokenizer.add_bos, tokenizer.add_eos
        self._names = {i: name for name, i in tokenizer.specials.items()}
        longest = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        specials, ids = self._plain.specials, []
        for part in self._pattern.split(text):
            ids += [specials[part]] if part in specials else self._plain.encode(part) if part else []
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        text = ""
        for special, group in itertools.groupby(map(int, ids), self._names.get):
            run = list(group)
            text += self._plain.decode(run) if special is None else special * len(run)
        return text

    def pieces(self) -> list[str]:
        return self._plain.pieces()

    def size(self, token: int) -> int:
        return self._plain.size(token)

    def save(self, folder: epath.PathLike) -> None:
        self._plain.save(folder)


def predicted_bytes(tokenizer: Tokenizer, document: Sequence[int] | np.ndarray, size: int) -> int:
    """Of the `size` bytes of a document's text, those that a model is asked for: with a bos before them all of them;
    without one the first token is given, and what it stands for is no part of the sum.
    """
    return size if tokenizer.add_bos or not len(document) else max(0, size - tokenizer.size(int(document[0])))


def well_formed(what: str, text: str) -> str:
    """The text. Raises `Mistake` where it holds half of a surrogate pair: no tokenizer reads it, no file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Mistake(f"{what} holds {text[e.start]!r}, half of a surrogate pair, at character {e.start}") from None
    return text


def sample(texts: Iterable[str], characters: int) -> list[str]:
    """A uniform sample of documents of about `characters` in all, in one pass and in bounded memory.

    A document is kept while the hash of its text is below a threshold, which halves whenever too much is held. So which
    ones are kept depends on the texts alone, not on their order, and equal documents are all in or all out.
    """
    held, size, threshold = [], 0, 1 << 64
    for text in texts:
        rank = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        if rank >= threshold:
            continue
        held.append((rank, text))
        size += len(text)
        while size > characters and len(held) > 1:
            threshold //= 2
            held = [(rank, text) for rank, text in held if rank < threshold]
            size = sum(len(text) for _, text in held)
    return [text for _, text in held]


def sentences(texts: Iterable[str], characters: int = 4000) -> Iterator[str]:
    """Cut texts into pieces of at most `characters`: trainers want short sentences, and some skip long ones."""
    for text in texts:
        yield from cut(text, characters)


def fingerprint(*parts: object) -> str:
    """A short digest of everything that decides which ids a tokenizer gives."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def save(tokenizer: Tokenizer, folder: epath.PathLike, kind: str, files: Mapping[str, bytes], **load: Any) -> None:
    """Write a tokenizer's files, and last what `load` needs: half a tokenizer is never loaded."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    spec = dict(kind=kind, vocab=tokenizer.vocab, fingerprint=tokenizer.fingerprint, load=load)
    (folder / SPEC).write_text(json.dumps(spec, indent=1) + "\n")


def _kind(name: str) -> Any:
    return lookup.module(__name__, name)
