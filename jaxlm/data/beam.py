"""The work of `jaxlm.data.encode.ordered` on Apache Beam: many machines, and the same results in the same order.

    jaxlm prepare --config=FILE --config.store=STORE --beam="OPTIONS"                    OPTIONS are Beam's own:

    --runner=DirectRunner --direct_num_workers=4 --direct_running_mode=multi_processing
    --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp
        --sdk_container_image=IMAGE --sdk_location=container --max_num_workers=64
    --runner=FlinkRunner --flink_master=HOST:8081 --parallelism=64
        --environment_type=DOCKER --environment_config=IMAGE
    --runner=SparkRunner --spark_master_url=spark://HOST:7077
        --environment_type=DOCKER --environment_config=IMAGE

IMAGE is Beam's image for this Python with jaxlm in it (FROM apache/beam_python3.11_sdk:VERSION, RUN pip install
'jaxlm[beam]'). Sources and STORE lie where every machine reaches them: gs://, s3:// or a shared disk. DirectRunner
needs nothing, and holds all text in memory: it is for trying things out.

A source of files is read file by file, all at a time; another one by one machine. Batches are worked on wherever there
is room. Each result is a file, STORE/NAME/selection/beam/SHARD-BATCH, and the program that started it all takes them in
the order of (shard, batch). That is the order in which one process would have read them, so what it writes is the same,
to the byte. This, training the tokenizer, and the verdicts on duplicates are all that one machine does.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
import itertools
import pickle
import re
import shlex
from typing import Any, TypeAlias
import uuid

from etils import epath
import numpy as np

from jaxlm.data import files
from jaxlm.data import sources as source_kinds
from jaxlm.data.encode import Batch, batches
from jaxlm.data.pipeline import Reading, Selection
from jaxlm.data.splits import Splitter
from jaxlm.lookup import Mistake

Shard: TypeAlias = tuple[int, str, np.ndarray | None]  # its number, the spec to read, and the verdicts on its documents


class Beam:
    """Machines that Apache Beam's options name; raises `Mistake` where it is not installed or no runner is named."""

    resumes = False  # a run that was killed begins anew

    def __init__(self, flags: str):
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as e:
            raise Mistake(f"--beam needs Apache Beam: pip install jaxlm[beam] ({e})") from None
        words = shlex.split(flags)
        if not any(word.startswith("--runner") for word in words):
            raise Mistake(f'--beam={flags!r} names no runner; for example --beam="--runner=DirectRunner"')
        self._pipeline = partial(apache_beam.Pipeline, options=PipelineOptions(words))
        try:
            self._pipeline()  # makes its runner, and runs nothing
        except (ImportError, AttributeError, ValueError) as e:
            raise Mistake(f"--beam={flags!r}: {e}") from None
        self._counts: dict[str, list[int]] = {}  # documents in each shard, by the source's spec

    def __call__(
        self, work, reading: Reading, folder: epath.Path, *, tally=None, read=0, together=False, alone=False
    ) -> Iterator[tuple[int, Any]]:
        """As `jaxlm.data.pipeline.Run` says; whoever asks a model has it once in each of Beam's processes."""
        assert not read
        shards = self._shards(reading, together)
        scratch = folder / "beam"
        if scratch.exists():
            scratch.rmtree()
        scratch.mkdir(parents=True)
        self._run(shards, reading, scratch, work)
        done = [_take(scratch / f"{index:06}") for index in range(len(shards))]
        self._counts[reading.spec] = [documents for _, documents, _ in done]
        for index, (batches_, documents, counts) in enumerate(done):
            for batch in range(batches_):
                here, result = _take(scratch / f"{index:06}-{batch:09}")
                yield read + here, result
            read += documents
            if tally is not None:
                tally.update(counts)
        scratch.rmtree()

    def _shards(self, reading: Reading, together: bool) -> list[Shard]:
        """A source file by file; whole where it has no files, or its batches or its documents' numbers forbid it."""
        verdict = reading.selection and reading.selection.verdict
        specs = [reading.spec] if together else _by_file(reading)
        counts = self._counts.get(reading.spec, [])
        if verdict is None:
            return [(index, spec, None) for index, spec in enumerate(specs)]
        if len(counts) != len(specs):  # the verdicts are of an earlier run
            return [(0, reading.spec, verdict)]
        ends = itertools.accumulate(counts)
        return [(i, spec, verdict[end - n : end]) for i, (spec, n, end) in enumerate(zip(specs, counts, ends))]

    def _run(self, shards: list[Shard], reading: Reading, scratch: epath.Path, work: Callable[[Batch], Any]) -> None:
        import apache_beam as beam

        try:
            with self._pipeline() as pipeline:
                _ = (
                    pipeline
                    | beam.Create(shards)
                    | "spread shards" >> beam.Reshuffle()
                    | "read" >> beam.FlatMap(partial(_read, str(scratch), reading.splitter))
                    | "spread batches" >> beam.Reshuffle()
                    | "work" >> beam.Map(partial(_do, str(scratch), work))
                )
        except Exception as e:  # a runner wraps what its workers raise
            if mistake := re.search(r"Mistake: (.+?)(?: \[while running|\n|$)", str(e)):
                raise Mistake(mistake[1]) from e
            raise


def _by_file(reading: Reading) -> list[str]:
    if not reading.source.by_file:
        return [reading.spec]
    kind, _, rest = reading.spec.partition(":")
    path, options = source_kinds.options(rest)
    said = "&".join(f"{name}={value}" for name, value in (dict(on_error="raise") | options).items())
    return [f"{kind}:{name}?{said}" for name in files.match(path)]


def _read(scratch: str, splitter: Splitter, shard: Shard) -> Iterator[tuple[str, int, Batch]]:
    """The batches of a shard, each with its name and how many of the shard's documents are read by then."""
    index, spec, verdict = shard
    selection = None if verdict is None else Selection(verdict, Counter())
    tally, count, read = Counter(), 0, 0
    documents = Reading(spec, source_kinds.find(spec), splitter, selection).documents(tally)
    for read, batch in batches(documents, 0):
        yield f"{index:06}-{count:09}", read, batch
        count += 1
    _put(epath.Path(scratch) / f"{index:06}", (count, read, tally))


def _do(scratch: str, work: Callable[[Batch], Any], given: tuple[str, int, Batch]) -> None:
    name, read, batch = given
    _put(epath.Path(scratch) / name, (read, work(batch)))


def _put(path: epath.Path, content: Any) -> None:
    """Write so that nobody ever reads a half; a second try writes the same."""
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    beside.write_bytes(pickle.dumps(content))
    beside.replace(path)


def _take(path: epath.Path) -> Any:
    return pickle.loads(path.read_bytes())
