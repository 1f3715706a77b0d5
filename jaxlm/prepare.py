"""Turn sources of text into a token store: read, split, encode in parallel and append, in bounded memory.

    jaxlm prepare --config=configs/quickstart.py --config.store=data/python_docs

Run again after a kill it goes on where it was, to the very same bytes; run again when done it says so. The store's
card.html tells what is in it. --explain (or --explain=20) shows for a sample of documents what the rules of
`config.prepare.clean` do to each, and makes nothing; --show=N prints the first N rows of a finished store as the
config's model gets them.
Read `prepare` first.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import inspect
import itertools
import re
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxlm import config, program
from jaxlm.data import augmentation as augmentations
from jaxlm.data import card, tokenizers
from jaxlm.data import pipeline as pipelines
from jaxlm.data import sources as source_kinds
from jaxlm.data import store as token_store
from jaxlm.data.augmentation import Augmentation, Write
from jaxlm.data.beam import Beam
from jaxlm.data.encode import dtype, encode
from jaxlm.data.explain import explain
from jaxlm.data.pipeline import Local, Pipeline, Reading, Run, Selection
from jaxlm.data.splits import Splitter
from jaxlm.data.store import read_json, write_json
from jaxlm.lookup import Mistake, keywords, known, spend

COMMIT = 4 << 20  # tokens between two commits: what is held in memory, and what a kill can cost
SELECTION = "selection"  # the folder in a source's of what `jaxlm.data.pipeline` and `jaxlm.data.beam` keep meanwhile
FORMAT = 1  # of the store; a change here asks for a new one


def prepare(
    store: str,
    sources: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    *,
    validation: float = 0.05,
    split: str = "document",
    split_seed: int = 0,
    clean: Sequence[str | Mapping[str, Any]] = (),
    dedup: Mapping[str, Any] | None = None,
    decontaminate: Mapping[str, Any] | None = None,
    augment: Sequence[str | Mapping[str, Any]] = (),
    workers: int | None = None,
    beam: str = "",
    overwrite: bool = False,
) -> token_store.Store:
    """Make the token store at `store` from `sources` (name -> spec), or finish it, and open it.

    `tokenizer` is a kind with its training options, or with the `path` of one to load; it is trained on the training
    split of all sources. `split` says what is held out for validation: whole documents ("document"), or the "tail" of
    each (`jaxlm.data.splits`). Each document passes the rules of `clean` (`jaxlm.data.cleaning`) and may share no run
    of words with the sets of `decontaminate` (`jaxlm.data.contamination`); of duplicates within and across sources
    the first stays (`dedup`: `jaxlm.data.dedup`). `augment` are rules that make further training documents
    (`jaxlm.data.augmentation`), which the tokenizer is trained without. The store is the same for every number of
    `workers` (processes; one for each core), and made on the machines of Apache Beam, whose options `beam` is
    (`jaxlm.data.beam`). Raises `Mistake` when the store was made from something else, unless it may `overwrite` it.
    """
    if not sources:
        raise Mistake('config.prepare.sources is empty; name texts, for example sources=dict(docs="text:data/*.txt")')
    if not store:
        raise Mistake("config.store is missing: the folder that will hold the tokens, for example data/python_docs")
    pipeline = Pipeline.of(Splitter(split, validation, split_seed), clean, dedup, decontaminate)
    augmentation = Augmentation(augment, _load)
    local = Local(workers or program.cores())
    run = Beam(beam) if beam else local
    found = {_checked_name(name): source_kinds.find(spec) for name, spec in sources.items()}
    root = _folder(store, found, overwrite)
    made = dict(format=FORMAT, split=split, validation=validation, split_seed=split_seed, **pipeline.recipe)
    recipes: dict[str, dict[str, Any]] = {
        name: dict(made, source=sources[name], inputs=dict(found[name].inputs)) for name in found
    }
    order = pipeline.dedup.order(found) if pipeline.dedup else []
    for name in found:
        recipes[name]["after"] = order[: order.index(name)] if order else None  # whose documents win
    readings = {name: Reading(sources[name], found[name], pipeline.splitter) for name in found}
    chosen = _select(root, {name: readings[name] for name in order}, recipes, pipeline, run) if order else {}
    readings = {name: reading._replace(selection=chosen.get(name)) for name, reading in readings.items()}
    tok = _tokenizer(root / "tokenizer", dict(tokenizer), _training_texts(root, readings, pipeline, local), recipes)
    augmented = augmentations.recipe(augment) or None
    for name, reading in readings.items():
        recipe = dict(recipes[name], tokenizer=tok.fingerprint, augment=augmented)
        _prepare_source(root / name, reading, recipe, tok, pipeline, augmentation, run)
    for name in found:
        (root / name / SELECTION).rmtree(missing_ok=True)
    finished = token_store.open(store)
    card.write(finished)
    return finished


def _folder(store: str, sources: Iterable[str], overwrite: bool) -> epath.Path:
    """The folder of a store, empty where it may `overwrite` what is there; raises `Mistake` for what it cannot be."""
    root = epath.Path(store)
    if "://" not in store and (file := next((p for p in (root, *root.parents) if p.is_file()), None)):
        raise Mistake(f"config.store={store}: {file} is a file; a store is a folder")
    if (root / "config.json").is_file():
        raise Mistake(f"{store} is the workdir of a run: it has config.json; choose another folder for config.store")
    inside = list(root.iterdir()) if root.exists() else []
    if inside and not (root / "tokenizer").is_dir() and not any((path / SELECTION).is_dir() for path in inside):
        raise Mistake(f"{store} is not empty and no token store; choose another folder for config.store")
    if overwrite and root.exists():
        print(f"{store}: removed, to be made anew")
        root.rmtree()
        return root
    for path in inside:
        named = path.name in (*sources, "tokenizer") or not path.is_dir()
        if not named and not (path / "manifest.json").exists():
            raise Mistake(
                f"{store} holds the unfinished source {path.name}, which config.prepare.sources does not name: "
                f"name it to finish it, or remove {path}"
            )
    return root


def _select(
    root: epath.Path, sources: Mapping[str, Reading], recipes: Mapping[str, dict], pipeline: Pipeline, run: Run
) -> dict[str, Selection]:
    """Say which documents of unfinished sources are no duplicates, of each other or of finished ones'; first wins."""
    folders = {name: root / name / SELECTION for name in sources}
    for name, recipe in recipes.items():
        for stored in (root / name / "manifest.json", folders[name] / "recipe.json"):
            if stored.exists():
                done = read_json(stored)
                _same(root / name, {k: done.get(k) for k in recipe}, recipe)
    todo = [name for name in sources if not (root / name / "manifest.json").exists()]
    if not all(pipelines.load(folders[name]) for name in todo):
        for name, reading in sources.items():
            folders[name].mkdir(parents=True, exist_ok=True)
            if not (folders[name] / "recipe.json").exists():
                write_json(folders[name] / "recipe.json", recipes[name])
            with _named(name), _Meter(f"{name}, duplicates", reading.source.size, 0, unit="documents") as meter:
                for documents, characters in pipelines.look(folders[name], reading, pipeline, run):
                    meter.advance(documents, characters)
        pipelines.decide(list(folders.values()), pipeline)
    return {name: selection for name in todo if (selection := pipelines.load(folders[name]))}


def _training_texts(
    root: epath.Path, sources: Mapping[str, Reading], pipeline: Pipeline, local: Local
) -> Iterator[str]:
    """The training split of all sources, cleaned."""
    for name, reading in sources.items():  # without rules there is nothing to share out
        results = local(pipeline.parts, reading, root / name / SELECTION, alone=not pipeline.cleaner.rules)
        with _named(name):
            for _, (pairs, _) in results:
                yield from (train for train, _ in pairs if train)


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Say of which source a mistake is that was found in its text."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"{source}: {mistake}") from mistake


@functools.cache
def _load(workdir: str) -> Write:
    """An encoder-decoder that writes for `jaxlm.data.augmentation`, which knows no models."""
    from jaxlm import lm  # here, so that preparing without it needs no jax

    model = lm.load(workdir)
    if model.blueprint.kind != "encoder-decoder":
        raise Mistake(f"config.prepare.augment: {workdir} is of the kind {model.blueprint.kind}, no encoder-decoder")

    def write(texts: list[str], copies: int, *, beams: int, max_new_tokens: int) -> list[list[str]]:
        fits = [0 < len(model.document(text)) <= model.context for text in texts]
        given = [text for text, fit in zip(texts, fits) if fit]
        how: dict[str, Any] = dict(beams=beams) if beams > 1 else dict(temperature=0.0)
        found = model.generate(given, max_new_tokens=max_new_tokens, num_return_sequences=copies, **how)
        answers = iter([answer] if isinstance(answer, str) else answer for answer in found)
        return [next(answers) if fit else [] for fit in fits]

    return write


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("tokenizer", "card.html"):
        raise Mistake(
            f"config.prepare.sources: {name!r} cannot be a source's name: it names a folder beside tokenizer/"
        )
    return name


def _tokenizer(
    folder: epath.Path, spec: dict[str, Any], texts: Iterator[str], recipes: Mapping[str, dict]
) -> tokenizers.Tokenizer:
    """The store's tokenizer: loaded, or trained on `texts`, the training split of all sources, and saved."""
    recipe = dict(tokenizer=spec, sources=recipes)
    if (folder / "recipe.json").exists():
        stored = read_json(folder / "recipe.json")
        # A source that joins an existing store uses its tokenizer; one that was there must be the same still.
        shared = [name for name in recipes if name in stored["sources"]]
        for was, now in [(stored["tokenizer"], spec), *((stored["sources"][name], recipes[name]) for name in shared)]:
            _same(folder, was, now)
        return tokenizers.load(folder)
    if "path" in spec:
        tok = tokenizers.load(spec)
    else:
        if (first := next(texts, None)) is None:
            specs = ", ".join(recipe["source"] for recipe in recipes.values())
            raise Mistake(f"there is no text to train a tokenizer on in {specs}")
        begun = time.perf_counter()
        tok = tokenizers.train(itertools.chain([first], texts), spec)
        print(f"tokenizer: {spec['kind']} with {tok.vocab:,} tokens, trained in {time.perf_counter() - begun:.1f} s")
    tok.save(folder)
    write_json(folder / "recipe.json", recipe)
    return tok


def _same(where: epath.Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `Mistake` when what is at `where` was made otherwise than is asked for now."""
    changed = [f"{k}: {was.get(k)!r} there, {now.get(k)!r} now" for k in {**was, **now} if was.get(k) != now.get(k)]
    if changed:
        remedy = "choose another config.store, or make it anew with --overwrite"
        raise Mistake(f"{where} was made differently ({'; '.join(changed)}); {remedy}")


def _prepare_source(
    folder: epath.Path,
    reading: Reading,
    recipe: dict[str, Any],
    tok: tokenizers.Tokenizer,
    pipeline: Pipeline,
    augmentation: Augmentation,
    run: Run,
) -> None:
    """Write one source's arrays, committing its progress as it goes, and its manifest last."""
    progress, manifest = folder / "progress.json", folder / "manifest.json"
    if manifest.exists():
        done = read_json(manifest)
        _same(folder, {k: done.get(k) for k in recipe}, recipe)
        progress.unlink(missing_ok=True)
        print(f"{folder.name}: already prepared, {_summary(done)}")
        return
    state = read_json(progress) if progress.exists() else dict(recipe, read=0, splits=None, counts={})
    _same(folder, {k: state.get(k) for k in recipe}, recipe)
    if not run.resumes:  # from the beginning, over what is there: it is the same
        state.update(read=0, splits=None, counts={})
    if state["read"]:
        print(f"{folder.name}: going on after {state['read']:,} documents")

    tally: Counter[str] = Counter()
    counts, read = Counter(state.get("counts", {})), state["read"]
    writer = token_store.Writer(str(folder), dtype(tok), state["splits"])
    work = functools.partial(encode, tok, pipeline.parts, augmentation)
    results = run(
        work, reading, folder / SELECTION, tally=tally, read=read,
        together=not augmentation.alone, alone=augmentation.by_model,
    )  # fmt: skip
    done = sum(size["bytes"] for size in writer.sizes.values())
    with _named(folder.name), _Meter(folder.name, reading.source.size, done) as meter:
        for read, encoded in results:
            counts.update(encoded.counts)
            for part in encoded.parts:
                writer.append(*part)
                meter.advance(len(part.tokens), int(part.sizes.sum()))
            if writer.waiting >= COMMIT:
                write_json(progress, dict(recipe, read=read, splits=writer.commit(), counts=counts))
    splits, selection = writer.commit(), reading.selection
    copies = {k.removeprefix("copies/"): n for k, n in sorted(counts.items()) if k.startswith("copies/")}
    report = pipeline.report(selection.counts if selection else counts, selection and selection.verdict)
    if not splits["train"]["documents"]:
        folder.rmtree()  # a source that can never be finished must not keep the others from being used
        raise Mistake(
            f"{folder.name}: {recipe['source']} leaves nothing to train on (left out: {_left_out(tally, report)})"
        )
    if pipeline.splitter.validation and not splits["validation"]["documents"]:
        print(f"{folder.name}: no document fell into validation; with so few, split='tail' holds out a part of each")
    cut, skipped = tally.pop("cut", 0), {fault: count for fault, count in sorted(tally.items()) if count}
    outcome = dict(
        vocab=tok.vocab,
        licence=reading.source.licence,
        splits=splits,
        cut=cut,
        skipped=skipped,
        read=read,
        copies=copies,
        **report,
    )
    write_json(manifest, recipe | outcome)
    progress.unlink(missing_ok=True)
    print(f"{folder.name}: {_summary(outcome)}, {meter.rate:,.0f} tokens/s")


def _summary(manifest: Mapping[str, Any]) -> str:
    splits = [
        f"{split} {size['documents']:,} documents, {size['tokens']:,} tokens, {size['bytes'] / 1e6:,.2f} MB"
        for split, size in manifest["splits"].items()
    ]
    left_out = _left_out(manifest["skipped"], manifest)
    copies = [f"{count:,} copies by {kind}" for kind, count in manifest.get("copies", {}).items()]
    return "; ".join(splits + copies + [f"left out: {count:,} ({why})" for why, count in left_out.items()])


def _left_out(skipped: Mapping[str, int], report: Mapping[str, Any]) -> dict[str, int]:
    """Why documents are not in the store, and how many: unreadable, dropped by a rule, or like another."""
    rules = {
        f"{rule}: {why}": n for rule, did in report.get("cleaning", {}).items() for why, n in did["reasons"].items()
    }
    duplicates = {f"{kind} duplicate": n for kind, n in report.get("duplicates", {}).items()}
    return {why: n for why, n in {**skipped, **rules, **duplicates}.items() if n}


class _Meter:
    """A bar with tokens/s; a plain line every ten seconds where there is no terminal."""

    def __init__(self, name: str, size: int | None, done: int, unit: str = "tokens"):
        self._unit = unit
        self._name, self._tokens, self._begun, self._said = name, 0, time.perf_counter(), time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        console = rich.console.Console()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=size, completed=done)

    def __enter__(self) -> "_Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def rate(self) -> float:
        """Tokens a second, reading included."""
        return self._tokens / (time.perf_counter() - self._begun)

    def advance(self, tokens: int, size: int) -> None:
        self._tokens += tokens
        line = f"{self._name}: {self._tokens:,} {self._unit}, {self.rate:,.0f} {self._unit}/s"
        self._bar.update(self._task, advance=size, description=line)
        if self._bar.disable and time.perf_counter() - self._said > 10:
            self._said = time.perf_counter()
            print(line, flush=True)


def show(settings: Mapping[str, Any], count: int) -> None:
    """Print the first rows that the config's model is trained on, with their noise, in colour."""
    from jaxlm import train  # which imports jax
    from jaxlm.data.display import LEGEND, Display

    store = token_store.open(settings.get("store", ""))
    tokenizer, console = store.tokenizer(), rich.console.Console(highlight=False)
    display = Display(tokenizer)
    console.print(LEGEND)
    wanted = {key: settings[key] for key in keywords(train.examples) if key in settings}
    examples = spend("config", train.examples, wanted, store)
    for number, example in enumerate(itertools.islice(examples, count)):
        console.print(f"row {number}", style="bold underline")
        console.print(display.example(example), soft_wrap=True)


def main(argv: list[str]) -> None:
    """Read the command line and prepare the store of a config."""
    argv = ["--explain=20" if flag == "--explain" else flag for flag in argv]
    args = config.parse(__doc__ or "", argv, workdir=None, overwrite=False, workers=0, explain=0, show=0, beam="")
    for name in ("workers", "explain", "show"):
        if (count := getattr(args, name)) < 0:
            raise Mistake(f"--{name}={count} is a number from 0 up")
    if args.show:
        return show(args.config.to_dict(), args.show)
    section = args.config.get("prepare", ConfigDict()).to_dict()
    if args.explain:
        known("config.prepare", section, inspect.signature(prepare).parameters)
        wanted = {k: section[k] for k in ("sources", "clean", "decontaminate") if k in section}
        return spend("config.prepare", explain, wanted, count=args.explain)
    if args.workers:
        section["workers"] = args.workers
    if args.beam:
        section["beam"] = args.beam
    spend("config.prepare", prepare, section, args.config.get("store", ""), overwrite=args.overwrite)


if __name__ == "__main__":
    program.run("prepare", main)
