"""Files by pattern, opened as they come: plain, .gz or .zst.

    names = match("shards/**/*.jsonl.zst")      sorted; a Mistake when there is none
    with open(names[0]) as lines: ...           decompressed; a Mistake when the file is damaged or cut short

A path may be local, gs:// or s3://.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import difflib
import glob
import hashlib
import io

from etils import epath
import pyarrow as pa

from jaxlm.lookup import Mistake

CONTENT = 256 << 20  # bytes that are read in less than a second, to tell whether they are the same still
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def match(pattern: str) -> list[epath.Path]:
    """The files that a path or glob (`*`, `?`, `[...]`, locally `**`) names, sorted; raises `Mistake` for none."""
    path = epath.Path(pattern)
    if pattern and path.is_file():  # a name may hold the signs of a glob
        return [path]
    if pattern and path.is_dir():
        raise Mistake(f"{pattern} is a folder; name its files: {pattern.rstrip('/')}/*")
    wild = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), len(path.parts) - 1)
    root, rest = epath.Path(*path.parts[:wild]), "/".join(path.parts[wild:])
    if "://" in pattern:
        found = list(root.glob(rest)) if rest else []
    else:
        found = [epath.Path(name) for name in glob.glob(pattern, recursive=True)]
    if names := sorted(name for name in found if name.is_file()):
        return names
    if not root.is_dir():
        raise Mistake(f"no file matches {pattern!r} (there is no folder {root})")
    beside = sorted(name.name for name in root.iterdir() if name.is_file())
    near = difflib.get_close_matches(path.name, beside, n=5, cutoff=0.5) or beside[:5]
    raise Mistake(f"no file matches {pattern!r} (in {root}: {', '.join(near) or 'no files'})")


def inputs(names: list[epath.Path]) -> dict[str, str | int]:
    """Identify files: how many, how many bytes, and a digest of their names and lengths, and of what they hold.

    Of more than CONTENT bytes, which would take long to read, the times of their last change stand in for the content:
    these a copy does not always keep, so fewer bytes are better known by themselves.
    """
    stats = [name.stat() for name in names]
    size, digest = sum(stat.length for stat in stats), hashlib.sha256()
    for name, stat in zip(names, stats):
        digest.update(f"{name.name} {stat.length} {'' if size <= CONTENT else stat.mtime}\n".encode())
        if size <= CONTENT:
            with name.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return dict(files=len(names), bytes=size, digest=digest.hexdigest()[:16])


def plain_size(names: list[epath.Path]) -> int | None:
    """Bytes in the files, None when some are compressed."""
    compressed = any(name.suffix in COMPRESSION for name in names)
    return None if compressed else sum(name.stat().length for name in names)


@contextmanager
def open(name: epath.Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed by its suffix; raises `Mistake` when it is damaged or ends too early."""
    compression = COMPRESSION.get(name.suffix)
    if compression and not name.stat().length:
        raise Mistake(f"{name}: damaged {compression} file: it has no bytes, not even those of an empty one")
    with name.open("rb") as raw:
        if compression is None:
            yield raw  # type: ignore[misc]
            return
        try:
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) as stream:
                yield io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
        except OSError as e:
            raise Mistake(f"{name}: damaged {compression} file: {e}") from e
