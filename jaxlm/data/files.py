"""Files by pattern, opened as they come: plain, .gz or .zst.

    names = match("shards/**/*.jsonl.zst")      sorted; a Mistake when there is none
    with open(names[0]) as lines: ...           decompressed; a Mistake when the file is damaged or cut short

A path may be local, gs:// or s3://.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import difflib
import hashlib
import io

from etils import epath
import pyarrow as pa

from jaxlm.lookup import Mistake

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def match(pattern: str) -> list[epath.Path]:
    """The files that a path or glob (`*`, `?`, `[...]`, `**`) names, sorted; raises `Mistake` when there is none."""
    path = epath.Path(pattern)
    if pattern and path.is_file():  # a name may hold the signs of a glob
        return [path]
    if pattern and path.is_dir():
        raise Mistake(f"{pattern} is a folder; name its files: {pattern.rstrip('/')}/*")
    parts = path.parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    root = epath.Path(*parts[:wild])
    if pattern and wild < len(parts) and root.is_dir():
        found = sorted(p for p in root.glob("/".join(parts[wild:])) if p.is_file())
        if found:
            return found
    folder = root if wild < len(parts) else root.parent
    beside = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=5, cutoff=0.5) or beside[:5]
    hint = f"in {folder}: {', '.join(near) or 'no files'}" if folder.is_dir() else f"there is no folder {folder}"
    raise Mistake(f"no file matches {pattern!r} ({hint})")


def inputs(names: list[epath.Path]) -> dict[str, str | int]:
    """Identify files by their names and lengths: how many, how many bytes, and a digest."""
    sizes = [name.stat().length for name in names]
    digest = hashlib.sha256("\n".join(f"{name.name} {size}" for name, size in zip(names, sizes)).encode())
    return dict(files=len(names), bytes=sum(sizes), digest=digest.hexdigest()[:16])


def plain_size(names: list[epath.Path]) -> int | None:
    """Bytes in the files, None when some are compressed."""
    compressed = any(name.suffix in COMPRESSION for name in names)
    return None if compressed else sum(name.stat().length for name in names)


@contextmanager
def open(name: epath.Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed by its suffix; raises `Mistake` when it is damaged or ends too early."""
    compression = COMPRESSION.get(name.suffix)
    with name.open("rb") as raw:
        if compression is None:
            yield raw  # type: ignore[misc]
            return
        try:
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) as stream:
                yield io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
        except OSError as e:
            raise Mistake(f"{name}: damaged {compression} file: {e}") from e
