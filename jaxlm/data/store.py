"""The token store: token ids, document offsets and byte counts as zarr3 arrays, on a local disk, gs:// or s3:// alike.

    STORE/tokenizer/                     the one tokenizer of all sources (jaxlm.data.tokenizers)
    STORE/docs/manifest.json             written last: a source without it is not finished, and never read
    STORE/docs/train/tokens   uint16     [ 2  71  12   9   3   2  40   3 ]    bos a b c eos bos d eos
    STORE/docs/train/offsets  int64      [ 0                   5           8 ]    document i: from offsets[i] to [i + 1]
    STORE/docs/train/bytes    int64      [ 3                   1 ]                UTF-8 bytes of each document's text

    docs = open("data/python_docs").split("docs", "validation")
    docs.document(0), docs.read(100, 1124)                            int32 token ids

Read `open` and `Split` to use a store, `Writer` to see how one is made.
"""

from collections.abc import Iterable, Mapping
from functools import cache, cached_property
import json
from typing import Any

from etils import epath
import numpy as np
import tensorstore as ts

from jaxlm import paths
from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake, key

SPLITS = ("train", "validation")
# A shard is a file, a chunk is what one read decodes (bytes before compression): few files for large corpora, and yet
# cheap rows of 1-8 thousand tokens (measured: 6,000 random rows of 1,024 tokens a second from one thread).
SHARD, CHUNK = 32 << 20, 32 << 10
CACHE = 64 << 20
HELD = 64 << 20  # tokens: a split that has no more is held in memory, where a read costs 2 µs and not 60


class Split:
    """Documents of one split, read at random; safe to share between threads and to send to another process."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Split, (self.path,)  # open arrays stay behind; the other process opens its own

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document starts, and the end of the last one: int64[documents + 1]."""
        return _read(f"{self.path}/offsets", _opened(f"{self.path}/offsets"))

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text: int64[documents]."""
        return _read(f"{self.path}/bytes", _opened(f"{self.path}/bytes"))

    @cached_property
    def _tokens(self) -> ts.TensorStore | np.ndarray:
        tokens = _opened(f"{self.path}/tokens")
        return _read(f"{self.path}/tokens", tokens) if tokens.shape[0] <= HELD else tokens

    @property
    def tokens_count(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop of all documents end to end, int32[stop - start]."""
        tokens = self._tokens
        if isinstance(tokens, ts.TensorStore):
            tokens, start, stop = _read(f"{self.path}/tokens", tokens[start:stop]), 0, stop - start
        return np.array(tokens[start:stop], np.int32)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, with its bos and eos where the tokenizer has them: int32[length]."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))


class Store:
    """The finished sources below one path. Use `open`, which checks them."""

    def __init__(self, path: str, manifests: dict[str, dict]):
        self.path, self._manifests = path, manifests

    @property
    def sources(self) -> list[str]:
        return sorted(self._manifests)

    def manifest(self, source: str) -> dict[str, Any]:
        """What the source was made from and what came out; raises `Mistake` for one that the store does not hold."""
        return key(f"store {self.path}", source, self._manifests)

    def split(self, source: str, split: str) -> Split:
        """The documents of `source` in "train" or "validation"."""
        size = key(f"source {source!r} in store {self.path}", split, self.manifest(source)["splits"])
        found = Split(f"{self.path}/{source}/{split}")
        if (len(found), found.tokens_count) != (size["documents"], size["tokens"]):
            raise _damaged(found.path, f"{len(found)} documents, and its manifest has {size['documents']}")
        return found

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that all sources were encoded with."""
        return tokenizers.load(f"{self.path}/tokenizer")

    def predicted_bytes(self, source: str, split: str, documents: Iterable[int] | None = None) -> int:
        """UTF-8 bytes of text that a model is asked for in some `documents` of a split (all): what nats are divided by.

        Where the tokenizer adds no bos, a document's first token is given, and its bytes do not count.
        """
        found, tokenizer = self.split(source, split), self.tokenizer()
        chosen = np.arange(len(found)) if documents is None else np.asarray(documents, np.int64)
        if tokenizer.add_bos:
            return int(found.bytes[chosen].sum())
        firsts = ((i, found.read(at := int(found.offsets[i]), min(at + 1, int(found.offsets[i + 1])))) for i in chosen)
        return sum(tokenizers.predicted_bytes(tokenizer, first, int(found.bytes[i])) for i, first in firsts)

    @property
    def vocab(self) -> int:
        return next(iter(self._manifests.values()))["vocab"]


def open(path: str) -> Store:
    """Open a finished store; raises `Mistake` when there is none, or when one of its sources is not finished.

    A store with one source missing would train on another mixture than the config asks for, without a word.
    """
    root = epath.Path(path)
    remedy = f"Make it with: jaxlm prepare --config=FILE --config.store={path}"
    if not root.is_dir():
        stores = [p for p in root.parent.iterdir() if (p / "tokenizer").is_dir()] if root.parent.is_dir() else []
        raise Mistake(f"no token store at {path} (stores beside it: {', '.join(map(str, stores)) or 'none'}). {remedy}")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name != "tokenizer")
    manifests = {p.name: read_json(p / "manifest.json") for p in folders if (p / "manifest.json").exists()}
    unfinished = [p.name for p in folders if p.name not in manifests]
    if unfinished or not manifests:
        what = f"source {', '.join(unfinished)} is not finished" if unfinished else "it holds no source"
        if unfinished:
            remedy += (
                f" that names {' and '.join(unfinished)}, or remove {', '.join(str(root / n) for n in unfinished)}"
            )
        raise Mistake(f"token store {path}: {what} (finished: {', '.join(manifests) or 'none'}). {remedy}")
    for name, manifest in manifests.items():
        if not {"splits", "vocab"} <= manifest.keys():
            raise _damaged(f"{path}/{name}/manifest.json", "it does not say what the splits hold")
    return Store(str(root), manifests)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Read a small JSON file, wherever it lies."""
    try:
        return json.loads(epath.Path(path).read_text())
    except ValueError as e:
        raise _damaged(str(path), e) from None


def write_json(path: epath.PathLike, content: Mapping[str, Any]) -> None:
    """Write a small file so that a reader sees all of it or none."""
    path = epath.Path(path)
    beside = path.parent / f".{path.name}.new"
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


class Writer:
    """Appends documents to the splits of one source in bounded memory; what `commit` has returned for survives kill -9.

    Nothing is ever taken back: a writer that resumes from the sizes of the last commit is given the same documents
    again, and writes the same values over what a killed one left behind. So the bytes on disk are those of an
    uninterrupted run.
    """

    def __init__(self, path: str, dtype: str, sizes: Mapping[str, Mapping[str, int]] | None = None):
        """Begin at `path`, or go on from the `sizes` that the last commit returned."""
        self.sizes = {split: dict(sizes[split]) if sizes else dict(documents=0, tokens=0, bytes=0) for split in SPLITS}
        self.waiting = 0  # tokens that are not yet on disk
        self._columns = {}
        for split, size in self.sizes.items():
            at = dict(tokens=size["tokens"], offsets=size["documents"] + bool(sizes), bytes=size["documents"])
            kinds = dict(tokens=dtype, offsets="int64", bytes="int64")
            self._columns[split] = {name: _Column(f"{path}/{split}/{name}", kinds[name], at[name]) for name in at}
            if not sizes:
                self._columns[split]["offsets"].append(np.zeros(1, np.int64))

    def append(self, split: str, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents: their tokens end to end, and for each its number of tokens and of UTF-8 bytes."""
        size, column = self.sizes[split], self._columns[split]
        column["tokens"].append(tokens)
        column["offsets"].append(size["tokens"] + np.cumsum(lengths))
        column["bytes"].append(sizes)
        for name, more in dict(documents=len(lengths), tokens=len(tokens), bytes=int(sizes.sum())).items():
            size[name] += more
        self.waiting += len(tokens)

    def commit(self) -> dict[str, dict[str, int]]:
        """Put all that was appended on disk; returns what each split now holds."""
        for column in self._columns.values():
            for array in column.values():
                array.flush()
        self.waiting = 0
        return {split: dict(size) for split, size in self.sizes.items()}


class _Column:
    """A zarr3 array that grows at its end."""

    def __init__(self, path: str, dtype: str, size: int):
        self.size, self._pending = size, []
        exists = (epath.Path(path) / "zarr.json").exists()
        create = {} if exists else dict(create=True, dtype=dtype, shape=[0], metadata=_layout(np.dtype(dtype).itemsize))
        self._array = _open(path, write=True, **create)

    def append(self, values: np.ndarray) -> None:
        self._pending.append(values)

    def flush(self) -> None:
        values = np.concatenate([np.empty(0, self._array.dtype.numpy_dtype), *self._pending])
        start, self.size, self._pending = self.size, self.size + len(values), []
        if self._array.shape[0] < self.size:
            self._array = self._array.resize(exclusive_max=[self.size]).result()
        self._array[start : self.size].write(values).result()


def _layout(itemsize: int) -> dict[str, Any]:
    """Zarr metadata: shards of SHARD bytes, read in compressed chunks of CHUNK bytes with a checksum against damage."""
    little_endian, checksum = dict(name="bytes", configuration=dict(endian="little")), dict(name="crc32c")
    zstd = dict(name="zstd", configuration=dict(level=1))
    inner = dict(
        chunk_shape=[CHUNK // itemsize],
        codecs=[little_endian, zstd, checksum],
        index_codecs=[little_endian, checksum],
    )
    return dict(
        chunk_grid=dict(name="regular", configuration=dict(chunk_shape=[SHARD // itemsize])),
        codecs=[dict(name="sharding_indexed", configuration=inner)],
    )


@cache
def _context() -> ts.Context:
    """One per process: chunks and shard indices that were read recently stay in memory."""
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE}})


def _open(path: str, **how: Any) -> ts.TensorStore:
    """Open a zarr3 array: to read, or as `how` says. Stores do not change, so cached chunks are not checked again.

    Zeros are written like other values: what a reader misses is then damage.
    """
    spec = dict(driver="zarr3", kvstore=paths.kvstore(path), recheck_cached_data="open")
    spec |= dict(store_data_equal_to_fill_value=True) if how else dict(fill_missing_data_reads=False)
    if metadata := how.pop("metadata", None):
        spec["metadata"] = metadata
    return ts.open(spec, **(how or dict(read=True, context=_context()))).result()


def _opened(path: str) -> ts.TensorStore:
    try:
        return _open(path)
    except ValueError as e:
        raise _damaged(path, e) from None


def _read(path: str, array: ts.TensorStore) -> np.ndarray:
    """The values of an array or of a part of it. Raises `Mistake` where any are damaged or missing."""
    try:
        return array.read().result()
    except ValueError as e:
        raise _damaged(path, e) from None


def _damaged(path: str, why: object) -> Mistake:
    line = str(why).splitlines()[0]
    return Mistake(f"{path} is damaged or incomplete ({line}). Make the store anew: jaxlm prepare with --overwrite")
