"""What the cleaning rules do to a sample of documents, as a table: `jaxlm prepare --explain`.

The sample is the same every time: of the first documents of each source, those whose hash is smallest.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import heapq
import itertools
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlm.data import sources as source_kinds
from jaxlm.data.cleaning import Outcome, Step
from jaxlm.data.pipeline import Pipeline
from jaxlm.data.sources import Source
from jaxlm.data.splits import Splitter
from jaxlm.lookup import Mistake

AMONG = 10_000  # documents of a source, among which the sample is drawn
STYLES = dict(kept="", changed="yellow", dropped="red")


def explain(
    sources: Mapping[str, str],
    *,
    clean: Sequence[str | Mapping[str, Any]] = (),
    decontaminate: Mapping[str, Any] | None = None,
    count: int = 20,
) -> None:
    """Print which rule kept, changed or dropped each of `count` documents of each source, and why.

    Whether a document has duplicates cannot be said from a sample. Raises `Mistake` where there is no rule.
    """
    pipeline = Pipeline.of(Splitter("document", 0), clean, None, decontaminate)
    if not pipeline.cleaner.rules:
        raise Mistake('config.prepare.clean names no rule to explain; for example clean=["unicode", "gopher"]')
    found = {name: source_kinds.find(spec) for name, spec in sources.items()}
    table = Table("document", "rule", "did", "why", title="What the rules do", show_lines=False)
    for name, source in found.items():
        for number, text in sample(source, count):
            table.add_section()
            for row in _rows(f"{name} {number:,}", text, pipeline.cleaner(text)):
                table.add_row(*row)
    Console().print(table)


def sample(source: Source, count: int) -> list[tuple[int, str]]:
    """`count` documents with their numbers, in their order, drawn from the first AMONG by a hash of the text."""
    texts = (document.text for document in itertools.islice(source.read(), AMONG))
    hashed = ((hashlib.blake2b(text.encode(), digest_size=8).digest(), n, text) for n, text in enumerate(texts))
    return sorted((number, text) for _, number, text in heapq.nsmallest(count, hashed))


def _rows(name: str, text: str, outcome: Outcome) -> Iterator[tuple[Text, ...]]:
    """One row a rule; the first column says which document it is, how it begins, and what became of it."""
    opening = " ".join(text[:200].split())[:40]
    fate = "dropped" if outcome.text is None else f"{len(text.encode()):,} -> {len(outcome.text.encode()):,} bytes"
    labels = itertools.chain([name, opening, fate], itertools.repeat(""))
    for step, label in itertools.zip_longest(outcome.steps, itertools.islice(labels, max(3, len(outcome.steps)))):
        cells = (step.rule, step.did, _why(step)) if step else ("", "", "")
        yield Text(label or ""), *(Text(cell, STYLES[step.did] if step else "") for cell in cells)


def _why(step: Step) -> str:
    """In words: the reason and what was seen, or what was changed how often and how many bytes less there are."""
    if step.did == "dropped":
        return ": ".join(filter(None, [*step.why, step.detail]))
    if step.did == "changed":
        changes = ", ".join(f"{what} {times:,} x" for what, times in step.why.items())
        return "; ".join(filter(None, [changes, f"{-step.removed:+,} bytes"]))
    return ""
