"""Real code: `python-source:`, the standard library's own .py files (without its tests), each a document."""

from collections.abc import Iterator
from pathlib import Path
import platform
import sysconfig

from jaxlm.data.sources import Document, Report, Source, pieces

LICENCE = "PSF-2.0 (Python Software Foundation License)"
ROOT = Path(sysconfig.get_path("stdlib"))
# Tests are no prose and little library, and what is installed beside the library is not part of it.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source(path: str = "") -> Source:
    """The standard library of the Python that runs."""
    return Source(_documents, inputs, licence=LICENCE)


def inputs() -> dict[str, str | int]:
    """Which Python: its version, and the files that it was installed with."""
    sizes = [name.stat().st_size for name in modules()]
    return dict(python=platform.python_version(), files=len(sizes), bytes=sum(sizes))


def modules() -> list[Path]:
    """The library's .py files, sorted."""
    found = (name for name in ROOT.rglob("*.py") if not LEFT_OUT & set(name.relative_to(ROOT).parts))
    return sorted(name for name in found if not name.relative_to(ROOT).parts[0].startswith("config-"))


def _documents(report: Report) -> Iterator[Document]:
    for name in modules():
        yield from pieces(name.read_text(encoding="utf-8", errors="replace"))
