"""Parquet: `parquet:PATH?field=text`, one column of text, read a batch at a time."""

from collections.abc import Iterator, Mapping
from functools import partial
import itertools

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

from jaxlm import lookup
from jaxlm.data import files
from jaxlm.data.sources import Document, Report, Source, records
from jaxlm.lookup import Mistake

ROWS = 1024  # in one batch


def source(path: str, *, field: str = "text") -> Source:
    """Parquet files; only the column `field` is read."""
    names = files.match(path)
    return Source(partial(_documents, names, field), files.inputs(names))


def _documents(names: list[epath.Path], field: str, report: Report) -> Iterator[Document]:
    for name in names:
        yield from records(_rows(name, field), field, report)


def _rows(name: epath.Path, field: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        with name.open("rb") as raw, pq.ParquetFile(raw) as file:
            lookup.key(f"{name}: the schema", field, {column: None for column in file.schema_arrow.names})
            batches = file.iter_batches(batch_size=ROWS, columns=[field])
            values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                yield f"{name}, row {number}", {field: value}
    except (pa.ArrowInvalid, OSError) as e:
        raise Mistake(f"{name}: damaged, or not a Parquet file: {e}") from e
