"""Parquet: `parquet:PATH?field=text`, a column of text or a template over several, read a batch at a time."""

from collections.abc import Iterator, Mapping
from functools import partial

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

from jaxlm.data import files
from jaxlm.data.records import Text, documents
from jaxlm.data.sources import Document, Report, Source
from jaxlm.lookup import Mistake

ROWS = 1024  # in one batch


def source(path: str, *, field: str | None = None, template: str | None = None) -> Source:
    """Parquet files; only the columns that the text is made from are read."""
    text, names = Text(field, template), files.match(path)
    return Source(partial(_documents, names, text), partial(files.inputs, names), by_file=True)


def _documents(names: list[epath.Path], text: Text, report: Report) -> Iterator[Document]:
    for name in names:
        yield from documents(_rows(name, text), text, report)


def _rows(name: epath.Path, text: Text) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        with name.open("rb") as raw, pq.ParquetFile(raw) as file:
            text.check(f"{name}: the schema", file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=text.columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (pa.ArrowInvalid, OSError) as e:
        raise Mistake(f"{name}: damaged, or not a Parquet file: {e}") from e
