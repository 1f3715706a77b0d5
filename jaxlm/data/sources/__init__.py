"""Sources of text, one file a kind, each named by one string: `kind:PATH?option=value&option=value`.

    text:data/*.txt.gz?documents=line          a file, a line or a paragraph (blank) is a document
    jsonl:shards/**/*.jsonl.zst?field=body     one JSON object a line
    parquet:data/*.parquet?field=text
    tfds:lm1b:train?data_dir=/data             TensorFlow Datasets, without TensorFlow
    hf:Salesforce/wikitext:train?config=wikitext-2-raw-v1      the Hugging Face Hub, streamed; or a folder of files
    jsonl:qa.jsonl?template=Q: {question}? A: {answer}         records become text by a template (jaxlm.data.records)
    python-docs:    python-source:             what ships with every Python

Every kind takes `on_error=raise|skip`: what is done with text that cannot be read. The options begin at the last "?"
that a `name=` follows, so that "?" and every other sign may stand in a path; values are taken as they are, unescaped.
`template=` comes last: all that follows it is the template.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import re
from typing import NamedTuple

from jaxlm import lookup
from jaxlm.data.cut import cut
from jaxlm.lookup import Mistake

PIECE = 4 << 20  # characters that are held in memory as one; longer documents come in pieces


class Document(NamedTuple):
    """A text, or the piece of a long one that begins at character `start` of `total`."""

    text: str
    start: int
    total: int


class Fault(Exception):
    """Text that cannot be read: the kind of fault, for counting, and a message that says where."""

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind, self.message = kind, message


Report = Callable[[Fault], None]  # either raises, or counts and returns


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from; it can be read again and again, and gives the same every time."""

    documents: Callable[[Report], Iterator[Document]]
    identity: Callable[[], Mapping[str, str | int]]  # identifies what is read, so that a change is noticed
    size: int | None = None  # UTF-8 bytes to come, roughly, where that is known beforehand
    licence: str | None = None
    on_error: str = "raise"
    by_file: bool = False  # whether its path names files that can be read one by one, on several machines

    @functools.cached_property
    def inputs(self) -> Mapping[str, str | int]:
        """What identifies the text; the first time its files may be read for it."""
        return self.identity()

    def read(self, tally: Counter[str] | None = None) -> Iterator[Document]:
        """Yield the documents; raises `Mistake` at text that cannot be read, unless on_error=skip.

        `tally` counts what was left out, by the kind of fault, and under "cut" the documents that came in pieces.
        """
        tally = Counter() if tally is None else tally

        def report(fault: Fault) -> None:
            if self.on_error == "raise":
                raise Mistake(f"{fault.message} (on_error=skip leaves such out and counts them)")
            tally[fault.kind] += 1

        for document in self.documents(report):
            if document.start == 0 and len(document.text) < document.total:
                tally["cut"] += 1
            if document.total:
                yield document
            else:
                tally["empty"] += 1


def find(spec: str) -> Source:
    """The source that a spec names; raises `Mistake` for an unknown kind or option, and for missing files."""
    kind, colon, rest = spec.partition(":")
    if not colon:
        kinds = ", ".join(f"{name.replace('_', '-')}:" for name in lookup.names(__name__))
        raise Mistake(f"the source {spec!r} has no kind; write kind:PATH with one of: {kinds}")
    module = lookup.module(__name__, kind)
    path, given = options(rest)
    on_error = given.pop("on_error", "raise")
    lookup.key(f"{spec}: on_error", on_error, dict(skip=None, **{"raise": None}))
    return dataclasses.replace(lookup.spend(f"the source {kind!r}", module.source, given, path), on_error=on_error)


def options(rest: str) -> tuple[str, dict[str, str]]:
    """Take "PATH?a=1&b=2" apart."""
    rest, *template = re.split(r"[?&]template=", rest, maxsplit=1)
    options = {"template": template[0]} if template else {}
    if not (match := re.fullmatch(r"(.*)\?(\w+=[^?]*)", rest, re.DOTALL)):
        return rest, options
    pairs = [pair.partition("=") for pair in match[2].split("&")]
    return match[1], options | {name: value for name, _, value in pairs}


def pieces(text: str) -> Iterator[Document]:
    """A document that is in memory already, cut where it is too long."""
    start = 0
    for piece in cut(text, PIECE):
        yield Document(piece, start, len(text))
        start += len(piece)
