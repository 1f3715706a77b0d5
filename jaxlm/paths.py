"""Paths that may be gs:// or s3://, which `etils.epath` opens like others, and what differs for them.

    mirror = Mirror("gs://bucket/run")
    file = (mirror.folder / "metrics.jsonl").open("a")      in the workdir itself, where that is a folder
    mirror.sync()                                           now; it happens by itself every SECONDS, too
    mirror.close()

Objects in a bucket cannot grow, so what grows in a workdir there is a copy of local files.
"""

from collections.abc import Iterator
import logging
import os
from pathlib import Path
import re
import shutil
import tempfile
import threading
from typing import Any

from etils import epath

from jaxlm.lookup import Mistake

SECONDS = 30  # between two copies: what others see of a run under way is that old
log = logging.getLogger("jaxlm")


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names objects in a bucket, such as gs://bucket/run."""
    return "://" in str(path)


def check(what: str, path: str) -> None:
    """Raise `Mistake` for what looks like an address and is none of a bucket: `gs:/bucket`, `http://x`, `s3://`."""
    if re.match(r"\w+:/", path) and not re.fullmatch(r"(gs|s3)://\w[\w.-]+(/[^?#]*)?", path):
        raise Mistake(f"{what}={path} is no address of a bucket: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place from any folder; of what is in a bucket, epath would make a local path."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def move(folder: epath.Path, target: epath.Path) -> None:
    """Rename a folder; in a bucket, where there are none, its objects one after the other."""
    if not is_remote(folder):
        folder.rename(target)
        return
    for file in list(_files(folder)):
        file.copy(target / str(file).removeprefix(f"{folder}/"))
    folder.rmtree()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else [path]


def kvstore(folder: epath.PathLike) -> str | dict[str, Any]:
    """What TensorStore calls a folder."""
    if not is_remote(folder):
        return dict(driver="file", path=f"{absolute(folder)}/")
    folder = str(epath.Path(folder))  # without a slash behind it
    kind, _, place = folder.partition("://")
    bucket, _, name = place.partition("/")
    return s3(bucket, f"{name}/") if kind == "s3" else f"{folder}/"


def s3(bucket: str, path: str) -> dict[str, Any]:
    """What TensorStore calls objects of Amazon's kind: with the environment's endpoint, region and keys, where it has
    them, as s3fs does.
    """
    spec: dict[str, Any] = dict(driver="s3", bucket=bucket, path=path)
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = dict(type="environment")
    return spec


class Mirror:
    """A local folder whose files appear in `workdir`, copied whenever they have grown."""

    def __init__(self, workdir: str):
        self._target, self._remote = epath.Path(workdir), is_remote(workdir)
        self.folder = Path(tempfile.mkdtemp(prefix="jaxlm-")) if self._remote else Path(workdir)
        self._copied: dict[Path, int] = {}
        self._one, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        if self._remote:
            self._thread.start()

    def sync(self) -> None:
        """Copy what has grown since the last time; raises what kept it from there."""
        if not self._remote:
            return
        with self._one:
            for file in sorted(self.folder.rglob("*")):
                if file.is_file() and self._copied.get(file) != (size := file.stat().st_size):
                    (self._target / file.relative_to(self.folder).as_posix()).write_bytes(file.read_bytes())
                    self._copied[file] = size

    def close(self) -> None:
        """Copy the last of it."""
        if self._remote:
            self._end.set()
            self._thread.join()
            self.sync()
            shutil.rmtree(self.folder)

    def _keep(self) -> None:
        while not self._end.wait(SECONDS):
            try:
                self.sync()
            except Exception as e:  # it is tried again, and what `sync` or `close` meets is raised
                log.warning("%s: metrics could not be copied there yet (%s)", self._target, e)
