"""JSON lines: `jsonl:PATH?field=text`, one object a line, its text in one field; or by a template over several."""

from collections.abc import Iterator, Mapping
from functools import partial
import json

from etils import epath

from jaxlm.data import files
from jaxlm.data.records import Text, documents
from jaxlm.data.sources import Document, Fault, Report, Source
from jaxlm.data.sources.text import decode


def source(path: str, *, field: str | None = None, template: str | None = None) -> Source:
    """Files of JSON objects, one a line; blank lines are passed over."""
    text = Text(field, template)
    names = files.match(path)
    return Source(partial(_documents, names, text), partial(files.inputs, names), files.plain_size(names), by_file=True)


def _documents(names: list[epath.Path], text: Text, report: Report) -> Iterator[Document]:
    for name in names:
        yield from documents(_rows(name, report), text, report)


def _rows(name: epath.Path, report: Report) -> Iterator[tuple[str, Mapping[str, object]]]:
    with files.open(name) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = _object(line, name, number)
            except Fault as fault:
                report(fault)
            else:
                yield f"{name}, line {number}", row


def _object(line: bytes, name: epath.Path, number: int) -> Mapping[str, object]:
    text = decode(line, name, number)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Fault("bad JSON", f"{name}, line {number}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise Fault("bad JSON", f"{name}, line {number}: a JSON {type(value).__name__}, not an object")
    return value
