"""All that happens to a document between its source and its tokens: cleaned, checked, split; and which stay at all.

    pipeline = Pipeline.of(splitter, clean=["unicode"], dedup=dict(near=0.8), decontaminate=None)
    pipeline.parts(batch)              what workers do on the way to the tokenizer: pure, batch by batch
    look(folder, reading, pipeline, run)  for deduplication, one more pass over each source before that
    decide(folders, pipeline.dedup)    which documents are duplicates, once all were seen
    load(folder).of(documents)         those that stay

A pass reads everything and cleans it in parallel. Deduplication needs one of its own, because what stays is not known
before all was seen; cleaning alone needs none. The text is cleaned anew in each pass: to keep it from one to the next
would take as much disk as the sources. A source's folder holds:

    STORE/docs/selection/recipe.json               what was asked for (`jaxlm.prepare`); another config is refused
    STORE/docs/selection/part-000000000000.npz     of its documents from 0 on: dropped, digests, bands of signatures
    STORE/docs/selection/verdicts.npz              written when all parts are there, which then go; uint8 a document

A part is seen whole or not at all, so that a killed pass goes on after the last one. On disk a document costs 9 bytes
and 4 a permutation (1,033) until the verdicts are there; in memory what `dedup.verdicts` says.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from importlib import metadata
import io
import itertools
import json
from typing import Any, NamedTuple, Protocol

from etils import epath
import numpy as np

from jaxlm.data.cleaning import Cleaner
from jaxlm.data.contamination import Contamination, contamination
from jaxlm.data.dedup import EXACT, KEPT, NEAR, Dedup, Records, dedup, verdicts
from jaxlm.data.encode import Batch, Result, ordered
from jaxlm.data.sources import Source
from jaxlm.data.splits import Marked, Splitter
from jaxlm.lookup import Mistake, spend

PART = 64 << 20  # characters between two parts, a document counted as 1,000 more: what a kill can cost


class Seen(NamedTuple):
    """What deduplication must know of documents: bool[n], uint64[n], uint32[n, permutations]; and what was counted."""

    dropped: np.ndarray
    digests: np.ndarray
    signatures: np.ndarray
    counts: Counter[str]
    characters: int


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The rules, the last of which looks for contamination; picklable, and every method pure."""

    splitter: Splitter
    cleaner: Cleaner
    dedup: Dedup | None
    contamination: Contamination | None

    @classmethod
    def of(
        cls,
        splitter: Splitter,
        clean: Sequence[str | Mapping[str, Any]] = (),
        dedup_: Mapping[str, Any] | None = None,
        decontaminate: Mapping[str, Any] | None = None,
    ) -> "Pipeline":
        """From sections of `config.prepare`; raises `Mistake` for what they cannot be. Reads the evaluation sets."""
        cleaner = Cleaner.of(clean)
        duplicates = None if dedup_ is None else spend("config.prepare.dedup", dedup, dedup_)
        sets = None
        if decontaminate is not None:
            how = dict(clean=lambda text: cleaner(text).text)
            sets = spend("config.prepare.decontaminate", contamination, decontaminate, **how)
        return cls(splitter, cleaner.then("decontaminate", sets) if sets else cleaner, duplicates, sets)

    @property
    def recipe(self) -> dict[str, Any]:
        """All that the outcome depends on, as JSON would give it back; None for what is not done."""
        duplicates = dataclasses.asdict(self.dedup) if self.dedup else {}
        duplicates.pop("prefer", None)  # what it comes to is each source's `after`
        libraries = self.cleaner.libraries | (dict(rensa=metadata.version("rensa")) if self.dedup else {})
        return dict(
            libraries=libraries or None,
            clean=[dict(rule) for rule in self.cleaner.recipe] or None,
            dedup=duplicates or None,
            decontaminate=dict(self.contamination.recipe) if self.contamination else None,
        )

    def parts(self, batch: Batch) -> tuple[list[tuple[str, str]], Counter[str]]:
        """The (training, validation) texts of the documents that stay, in their order, and what the rules counted."""
        pairs, counts = [], Counter()
        for marked in batch:
            outcome = self.cleaner(marked.document.text)
            counts.update(outcome.counts)
            if outcome.text is not None:
                pairs.append(self.splitter.parts(marked, outcome.text))
        return pairs, counts

    def look(self, batch: Batch) -> Seen:
        """What is to be known of the documents of a batch before it can be said which are duplicates."""
        assert self.dedup
        dropped, digests, counts = np.zeros(len(batch), bool), np.zeros(len(batch), np.uint64), Counter()
        signatures = np.zeros((len(batch), self.dedup.permutations if self.dedup.near else 0), np.uint32)
        for i, marked in enumerate(batch):
            outcome = self.cleaner(marked.document.text)
            counts.update(outcome.counts)
            dropped[i] = outcome.text is None
            if outcome.text is not None:
                digests[i] = self.dedup.digest(outcome.text)
                if self.dedup.near:
                    signatures[i] = self.dedup.signature(outcome.text)
        return Seen(dropped, digests, signatures, counts, sum(len(marked.document.text) for marked in batch))

    def report(self, counts: Mapping[str, int], verdict: np.ndarray | None) -> dict[str, Any]:
        """For the manifest: what each rule did, and how many duplicates were left out."""
        duplicates = {}
        if verdict is not None:
            duplicates = dict(exact=int((verdict == EXACT).sum()), near=int((verdict == NEAR).sum()))
        return dict(cleaning=self.cleaner.report(counts), duplicates=duplicates)


class Selection(NamedTuple):
    """A source's verdicts, uint8[documents], and what the rules counted over all of its documents."""

    verdict: np.ndarray
    counts: Counter[str]

    def of(self, documents: Iterable[Marked]) -> Iterator[Marked | None]:
        """The documents, None in the place of those that go. Raises `Mistake` when they are not as many as before."""
        count = 0
        for count, marked in enumerate(documents, 1):
            if count > len(self.verdict):
                break
            yield marked if self.verdict[count - 1] == KEPT else None
        if count != len(self.verdict):
            raise Mistake(
                f"a source gives another number of documents than the {len(self.verdict):,} that it gave before"
            )


def load(folder: epath.Path) -> Selection | None:
    """A source's finished selection, None where there is none yet."""
    path = folder / "verdicts.npz"
    if not path.exists():
        return None
    verdict, counts = _read(path, "verdict", "counts")
    return Selection(verdict, _counts(counts))


class Reading(NamedTuple):
    """A source, the string that names it, and which of its documents stay (all, where no selection was made)."""

    spec: str
    source: Source
    splitter: Splitter
    selection: Selection | None = None

    def documents(self, tally: Counter[str] | None = None) -> Iterator[Marked | None]:
        """The documents, None in the place of those that are left out."""
        marked = self.splitter.mark(self.source.read(tally))
        return self.selection.of(marked) if self.selection else marked


class Run(Protocol):
    """Who does the work: `Local` processes, or `jaxlm.data.beam.Beam`'s machines."""

    @property
    def resumes(self) -> bool: ...  # whether it can begin after documents that were read before
    def __call__(
        self,
        work: Callable[[Batch], Result],
        reading: Reading,
        folder: epath.Path,
        *,
        tally: Counter[str] | None = None,
        read: int = 0,
        together: bool = False,
        alone: bool = False,
    ) -> Iterator[tuple[int, Result]]:
        """As `jaxlm.data.encode.ordered`. `folder` is the source's, for what must be kept meanwhile; `together`
        says that the batches must be those of one process, `alone` that one process of a machine must do all.
        """
        ...


class Local(NamedTuple):
    """Processes of this machine; in the name of its caller it reads the source itself."""

    workers: int
    resumes: bool = True

    def __call__(
        self, work, reading, folder, *, tally=None, read=0, together=False, alone=False
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """As `Run` says."""
        documents = itertools.islice(reading.documents(tally), read, None)
        return ordered(work, documents, 1 if alone else self.workers, read)


def look(folder: epath.Path, reading: Reading, pipeline: Pipeline, run: Run) -> Iterator[tuple[int, int]]:
    """Make or finish the parts of a source; yields how many documents and characters were looked at, batch by batch."""
    assert pipeline.dedup
    read = 0
    for path in _parts(folder):
        if run.resumes and path.name == f"part-{read:012}.npz":
            read += len(_read(path, "dropped")[0])
        else:
            path.unlink()  # a kill while they were removed left this one
    waiting: list[Seen] = []
    begun, size = read, 0
    for read, seen in run(pipeline.look, reading, folder, read=begun):
        waiting.append(seen)
        size += seen.characters + 1000 * len(seen.dropped)
        yield len(seen.dropped), seen.characters
        if size >= PART:
            _write_part(folder, begun, waiting, pipeline.dedup)
            waiting, begun, size = [], read, 0
    if waiting:
        _write_part(folder, begun, waiting, pipeline.dedup)


def decide(folders: Sequence[epath.Path], pipeline: Pipeline) -> None:
    """Write the verdicts on sources whose parts are all there; earlier sources win over later ones."""
    dedup = pipeline.dedup
    assert dedup
    paths = [_parts(folder) for folder in folders]
    every = [path for some in paths for path in some]
    dropped = [_column(some, "dropped", np.zeros(0, bool)) for some in paths]
    sizes = [len(_read(path, "dropped")[0]) for path in every]

    def signatures(which: np.ndarray) -> np.ndarray:
        found = [np.zeros((0, dedup.permutations), np.uint32)]
        for path, here in zip(every, np.split(which, np.searchsorted(which, np.cumsum(sizes)))):
            if len(here):
                start = sum(sizes[: len(found) - 1])
                found.append(np.concatenate(_read(path, *_bands(dedup), "rest"), axis=1)[here - start])
            else:
                found.append(found[0])
        return np.concatenate(found)

    band = lambda band: _column(every, _bands(dedup)[band], np.zeros((0, dedup.rows), np.uint32))  # noqa: E731
    digests = _column(every, "digests", np.zeros(0, np.uint64))
    verdict = verdicts(dedup, Records(np.concatenate(dropped), digests, band, signatures))
    for folder, some, mine in zip(folders, paths, np.split(verdict, np.cumsum([len(d) for d in dropped]))):
        counts = add(_counts(_read(path, "counts")[0]) for path in some)
        _write(folder / "verdicts.npz", dict(verdict=mine, counts=_bytes(counts)))
    for path in every:
        path.unlink()


def add(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of counts; unlike Counter's own it keeps what is negative (bytes that a rule added)."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return total


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("part-"))


def _bands(dedup: Dedup) -> list[str]:
    return [f"band-{band}" for band in range(dedup.bands)]


def _write_part(folder: epath.Path, first: int, waiting: Sequence[Seen], dedup: Dedup) -> None:
    signatures = np.concatenate([seen.signatures for seen in waiting])
    arrays = dict(
        dropped=np.concatenate([seen.dropped for seen in waiting]),
        digests=np.concatenate([seen.digests for seen in waiting]),
        rest=signatures[:, dedup.bands * dedup.rows :],
        counts=_bytes(add(seen.counts for seen in waiting)),
        **{name: dedup.band(signatures, band) for band, name in enumerate(_bands(dedup))},
    )
    _write(folder / f"part-{first:012}.npz", arrays)


def _write(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays so that a reader sees all of them or none."""
    buffer, beside = io.BytesIO(), path.parent / f".{path.name}.new"
    np.savez(buffer, allow_pickle=False, **arrays)
    beside.write_bytes(buffer.getvalue())
    beside.replace(path)


def _read(path: epath.Path, *names: str) -> list[np.ndarray]:
    with path.open("rb") as file, np.load(file) as arrays:
        return [arrays[name] for name in names]


def _column(paths: Iterable[epath.Path], name: str, empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *(_read(path, name)[0] for path in paths)])


def _bytes(counts: Mapping[str, int]) -> np.ndarray:
    return np.frombuffer(json.dumps(dict(sorted(counts.items()))).encode(), np.uint8)


def _counts(array: np.ndarray) -> Counter[str]:
    return Counter(json.loads(array.tobytes()))
