"""English that ships with every Python: `python-docs:`, the language's help topics and its library's docstrings.

It is 2.2 MB. A topic is a document, and so are all docstrings of one module together, in the order of the code:
held-out documents are then modules that training never saw, and not methods whose siblings it did.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
import warnings

from jaxlm.data.sources import Document, Report, Source, pieces, python_source

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source(path: str = "") -> Source:
    """The documentation of the Python that runs."""
    return Source(_documents, python_source.inputs, licence=python_source.LICENCE)


def _documents(report: Report) -> Iterator[Document]:
    for text in _texts():
        yield from pieces(text)


@cache
def _texts() -> list[str]:
    """All documents; parsing takes seconds, and a source is read more than once."""
    modules = ("\n\n".join(_docstrings(_parse(name))) for name in python_source.modules())
    return _topics() + [f"{text}\n" for text in modules if text]


def _topics() -> list[str]:
    """The help topics, but for those that are a section of a longer one: held out, they would be text that was seen."""
    from pydoc_data.topics import topics  # a large module that only this source needs

    texts = sorted(set(topics.values()), key=lambda text: (-len(text), text))
    paragraphs = [set(text.split("\n\n")) for text in texts]
    return [
        text
        for i, text in enumerate(texts)
        if not any(len(paragraphs[i] & longer) > len(paragraphs[i]) / 2 for longer in paragraphs[:i])
    ]


def _parse(name: Path) -> ast.AST:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules write "\d"; that is not the user's affair
        return ast.parse(name.read_bytes())


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, top down, without their indentation."""
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _docstrings(child)
