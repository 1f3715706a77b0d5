"""Plain text: `text:PATH?documents=file|line|blank`; "blank" takes what blank lines part, as paragraphs or poems."""

from collections.abc import Iterator
from functools import partial
import io

from etils import epath

from jaxlm import lookup
from jaxlm.data import files
from jaxlm.data.sources import PIECE, Document, Fault, Report, Source, pieces


def source(path: str, *, documents: str = "file") -> Source:
    """Files of UTF-8 text. Line ends inside a document stay as they are; the one that ends a line or paragraph goes."""
    read = lookup.key("text: documents", documents, dict(file=_by_file, line=_by_line, blank=_by_paragraph))
    names = files.match(path)
    return Source(partial(read, names), partial(files.inputs, names), files.plain_size(names), by_file=True)


def _by_file(names: list[epath.Path], report: Report) -> Iterator[Document]:
    for name in names:
        last, total, blocks = "", 0, 0
        try:
            for last in _texts(name):  # once for the length and for faults: a file is taken whole or not at all
                total, blocks = total + len(last), blocks + 1
        except Fault as fault:
            report(fault)
            continue
        start = 0
        for text in _texts(name) if blocks > 1 else [last]:
            yield Document(text, start, total)
            start += len(text)


def _by_line(names: list[epath.Path], report: Report) -> Iterator[Document]:
    for name in names:
        yield from _decoded(name, ((number, line) for number, line in _lines(name) if line.strip()), report)


def _by_paragraph(names: list[epath.Path], report: Report) -> Iterator[Document]:
    for name in names:
        yield from _decoded(name, _paragraphs(name), report)


def _decoded(name: epath.Path, parts: Iterator[tuple[int, bytes]], report: Report) -> Iterator[Document]:
    for number, part in parts:
        try:
            text = decode(part.rstrip(b"\r\n"), name, number)
        except Fault as fault:
            report(fault)
        else:
            yield from pieces(text)


def _lines(name: epath.Path) -> Iterator[tuple[int, bytes]]:
    with files.open(name) as stream:
        yield from enumerate(stream, 1)


def _paragraphs(name: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    first, held = 1, []
    for number, line in _lines(name):
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield first, b"".join(held)
            held = []
    if held:
        yield first, b"".join(held)


def _texts(name: epath.Path) -> Iterator[str]:
    """A file's text in blocks of about PIECE bytes."""
    with files.open(name) as stream:
        number = 1
        while block := _block(stream):
            yield decode(block, name, number)
            number += block.count(b"\n")


def _block(stream: io.BufferedReader) -> bytes:
    """About PIECE bytes that end with a line, or at least with a whole character."""
    block = stream.read(PIECE)
    if len(block) == PIECE and not block.endswith(b"\n"):
        block += stream.readline(PIECE)
        for _ in range(3):  # a character has at most three bytes after its first
            if not block.endswith(b"\n") and stream.peek(1)[:1].hex()[:1] in ("8", "9", "a", "b"):  # a later byte
                block += stream.read(1)
    return block


def decode(data: bytes, name: epath.Path, number: int) -> str:
    """The text of bytes that begin in line `number` of a file; raises `Fault` naming file, line and byte."""
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        before = data[: e.start]
        line, byte = number + before.count(b"\n"), e.start - before.rfind(b"\n")
        where = f"{name}, line {line}, byte {byte} of the line"
        raise Fault("invalid UTF-8", f"{where}: not valid UTF-8 ({e.reason})") from None
    return text.removeprefix("\ufeff") if number == 1 else text  # the mark of an encoding is not text
