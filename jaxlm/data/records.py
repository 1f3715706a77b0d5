"""Records to documents: the text in one field, or a template over several.

    qa = Text(template="{question} {answers.text.0}")
    qa.columns                                                                      ["answers", "question"]
    qa.of({"question": "Who?", "answers": {"text": ["Ada"]}}, "a.jsonl, line 1")    "Who? Ada"

A template is one line of text with names in braces; a dot goes into a field: to a key, or to a place in a list. `{{`
and `}}` are the braces themselves. Numbers are written out, the ids of a class label too.
"""

from collections.abc import Iterable, Iterator, Mapping
import re
import string
from typing import Any

import numpy as np

from jaxlm import lookup
from jaxlm.data.sources import Document, Fault, Report, pieces
from jaxlm.lookup import Mistake


class Text:
    """What of a record is its text: a `field` ("text" by default) or a `template`; raises `Mistake` for both."""

    def __init__(self, field: str | None = None, template: str | None = None):
        if field is not None and template is not None:
            raise Mistake(f"field={field} and template={template}: the text is one or the other")
        if template is None:
            self._parts, self.columns = None, [field or "text"]
            return
        self._parts = _parse(template)
        self.columns = sorted({path[0] for _, path in self._parts if path})

    def check(self, what: str, fields: Iterable[str]) -> None:
        """Raise `Mistake` where records of `what` lack a field that the text is made from."""
        fields = list(fields)
        for column in self.columns:
            lookup.key(what, column, dict.fromkeys(fields))

    def of(self, record: Mapping[str, Any], where: str) -> str:
        """The text of a record; raises `Fault` where there is none."""
        if self._parts is None:
            return _text(_field(record, self.columns[0], where), self.columns[0], where)
        return "".join(
            before + (_text(_inner(record, path, where), ".".join(path), where, numbers=True) if path else "")
            for before, path in self._parts
        )


def documents(rows: Iterable[tuple[str, Mapping[str, Any]]], text: Text, report: Report) -> Iterator[Document]:
    """The documents of records, each given with where it stands."""
    for where, row in rows:
        try:
            found = text.of(row, where)
        except Fault as fault:
            report(fault)
        else:
            yield from pieces(found)


def _parse(template: str) -> list[tuple[str, list[str]]]:
    """A template as (text, the path of the field after it; empty at the end)."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as e:
        raise Mistake(f"template={template}: {e}; a brace that is text is written twice") from None
    for _, name, form, how in parsed:
        if name is not None and (form or how or not re.fullmatch(r"[\w -]+(\.[\w -]+)*", name)):
            raise Mistake(f"template={template}: between braces stands the name of a field, as in {{answers.text.0}}")
    if not any(name for _, name, _, _ in parsed):
        raise Mistake(f"template={template} names no field; write it in braces, as in {{question}} {{answer}}")
    return [(before, name.split(".") if name else []) for before, name, _, _ in parsed]


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise Fault("missing field", f"{where}: {lookup.miss('the record', name, record)}")
    if record[name] is None:
        raise Fault("missing field", f"{where}: the record's {name!r} is null")
    return record[name]


def _inner(record: Mapping[str, Any], path: list[str], where: str) -> Any:
    value = _field(record, path[0], where)
    for done, name in enumerate(path[1:], 1):
        at = f"{where}: {'.'.join(path[:done])}"
        if isinstance(value, Mapping):
            value = _field(value, name, at)
        elif isinstance(value, list | tuple | np.ndarray):
            if not name.isdigit() or int(name) >= len(value):
                raise Fault("missing field", f"{at} has no place {name!r}; it has {len(value)}, counted from 0")
            value = value[int(name)]
        else:
            raise Fault("missing field", f"{at} is {type(value).__name__}, which holds no {name!r}")
    return value


def _text(value: Any, name: str, where: str, numbers: bool = False) -> str:
    value = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
    if numbers and not isinstance(value, str) and isinstance(getattr(value, "item", lambda: value)(), int | float):
        return str(value)
    if not isinstance(value, str):
        raise Fault("not text", f"{where}: the field {name!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a character
        raise Fault("invalid UTF-8", f"{where}: not valid Unicode at character {e.start} of {name!r}") from None
    return value
