"""TensorFlow Datasets: `tfds:NAME/CONFIG:SPLIT?field=text&data_dir=DIR`.

    tfds:wiki40b/en:train            tfds:my_corpus:train[:10%]?field=body&data_dir=/data
    tfds:squad:train?template={question} {answers.text.0}

TensorFlow is not needed; the data set is in ArrayRecord files.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from jaxlm.data.records import Text, documents
from jaxlm.data.sources import Document, Fault, Report, Source
from jaxlm.lookup import Mistake


def source(path: str, *, field: str | None = None, template: str | None = None, data_dir: str | None = None) -> Source:
    """A data set that is prepared already, in its `data_dir`; nothing is downloaded."""
    text = Text(field, template)
    name, colon, split = path.partition(":")
    if not (name and colon and split):
        raise Mistake(f"tfds:{path} needs a name and a split, as in tfds:wiki40b/en:train")
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise Mistake(f"the source tfds: needs the extra tfds: pip install 'jaxlm[tfds]' ({e})") from e
    try:
        rows = cast(Any, tfds.data_source(name, split=split, data_dir=data_dir, download=False))
    except Exception as e:  # of many kinds: unknown name, split, folder, file format
        where, why = data_dir or "its default folder", str(e).splitlines()[0]
        raise Mistake(f"tfds cannot open {name!r}, split {split!r}, in {where}: {why}") from e
    text.check(f"tfds:{path}: the data set", rows.dataset_info.features or {})
    inputs = dict(documents=len(rows), version=str(rows.dataset_info.version))
    return Source(partial(_documents, rows, path, text), lambda: inputs)


def _documents(rows: Any, path: str, text: Text, report: Report) -> Iterator[Document]:
    yield from documents(_rows(rows, path, report), text, report)


def _rows(rows: Any, path: str, report: Report) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number in range(len(rows)):
        where = f"tfds:{path}, example {number}"
        try:
            row = rows[number]
        except Exception as e:  # of many kinds: a damaged file, a feature that cannot be decoded
            report(Fault("unreadable", f"{where} cannot be read ({next(iter(str(e).splitlines()), type(e).__name__)})"))
        else:
            yield where, row
