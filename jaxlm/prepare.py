"""Turn sources of text into a token store: read, split, encode in parallel and append, in bounded memory.

    jaxlm prepare --config=configs/quickstart.py --config.store=data/python_docs

Run again after a kill it goes on where it was, to the very same bytes; run again when done it says so. The store's
card.html tells what is in it. --show=N prints the first N rows of a finished store as the config's model gets them.
Read `prepare` first.
"""

from collections import Counter
from collections.abc import Mapping
import itertools
import os
import re
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxlm import config, program
from jaxlm.data import card, tokenizers
from jaxlm.data import sources as source_kinds
from jaxlm.data import store as token_store
from jaxlm.data.encode import dtype, encode
from jaxlm.data.sources import Source
from jaxlm.data.splits import Splitter
from jaxlm.data.store import read_json, write_json
from jaxlm.lookup import Mistake, spend

COMMIT = 4 << 20  # tokens between two commits: what is held in memory, and what a kill can cost
FORMAT = 1  # of the store; a change here asks for a new one


def prepare(
    store: str,
    sources: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    *,
    validation: float = 0.05,
    split: str = "document",
    split_seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> token_store.Store:
    """Make the token store at `store` from `sources` (name -> spec), or finish it, and open it.

    `tokenizer` is a kind with its training options, or with the `path` of one to load; it is trained on the training
    split of all sources. `split` says what is held out for validation: whole documents ("document"), or the "tail" of
    each (`jaxlm.data.splits`). The store is the same for every number of `workers` (processes; one for each core).
    Raises `Mistake` when the store was made from something else, unless it may `overwrite` it.
    """
    if not store:
        raise Mistake("config.store is missing: the folder that will hold the tokens, for example data/python_docs")
    splitter = Splitter(split, validation, split_seed)
    found = {_checked_name(name): source_kinds.find(spec) for name, spec in sources.items()}
    root = epath.Path(store)
    if root.exists() and any(root.iterdir()) and not (root / "tokenizer").is_dir():
        raise Mistake(f"{store} is not empty and no token store; choose another folder for config.store")
    if overwrite and root.exists():
        print(f"{store}: removed, to be made anew")
        root.rmtree()

    made = dict(format=FORMAT, split=split, validation=validation, split_seed=split_seed)
    recipes = {name: dict(made, source=sources[name], inputs=dict(found[name].inputs)) for name in found}
    tok = _tokenizer(root / "tokenizer", dict(tokenizer), found, recipes, splitter)
    for name, source in found.items():
        recipe = dict(recipes[name], tokenizer=tok.fingerprint)
        _prepare_source(root / name, source, recipe, tok, splitter, workers or _cores())
    made = token_store.open(store)
    card.write(made)
    return made


def _cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name) or name == "tokenizer":
        raise Mistake(
            f"config.prepare.sources: {name!r} cannot be a source's name: it names a folder beside tokenizer/"
        )
    return name


def _tokenizer(
    folder: epath.Path,
    spec: dict[str, Any],
    sources: Mapping[str, Source],
    recipes: Mapping[str, dict],
    splitter: Splitter,
) -> tokenizers.Tokenizer:
    """The store's tokenizer: loaded, or trained on the training split of all sources and saved."""
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
        texts = (train for source in sources.values() for train, _ in splitter.parts(source.read()) if train)
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
    source: Source,
    recipe: dict[str, Any],
    tok: tokenizers.Tokenizer,
    splitter: Splitter,
    workers: int,
) -> None:
    """Write one source's arrays, committing its progress as it goes, and its manifest last."""
    progress, manifest = folder / "progress.json", folder / "manifest.json"
    if manifest.exists():
        done = read_json(manifest)
        _same(folder, {k: done.get(k) for k in recipe}, recipe)
        progress.unlink(missing_ok=True)
        print(f"{folder.name}: already prepared, {_summary(done)}")
        return
    state = read_json(progress) if progress.exists() else dict(recipe, read=0, splits=None)
    _same(folder, {k: state[k] for k in recipe}, recipe)
    if state["read"]:
        print(f"{folder.name}: going on after {state['read']:,} documents")

    tally: Counter[str] = Counter()
    texts = itertools.islice(splitter.parts(source.read(tally)), state["read"], None)
    writer = token_store.Writer(str(folder), dtype(tok), state["splits"])
    with _Meter(folder.name, source.size, done=sum(size["bytes"] for size in writer.sizes.values())) as meter:
        for read, parts in encode(texts, tok, workers, state["read"]):
            for part in parts:
                writer.append(*part)
                meter.advance(len(part.tokens), int(part.sizes.sum()))
            if writer.waiting >= COMMIT:
                write_json(progress, dict(recipe, read=read, splits=writer.commit()))
    splits = writer.commit()
    if not splits["train"]["documents"]:
        folder.rmtree()  # a source that can never be finished must not keep the others from being used
        raise Mistake(f"{folder.name}: {recipe['source']} leaves nothing to train on (left out: {dict(tally)})")
    if splitter.validation and not splits["validation"]["documents"]:
        print(f"{folder.name}: no document fell into validation; with so few, split='tail' holds out a part of each")
    cut, skipped = tally.pop("cut", 0), {fault: count for fault, count in sorted(tally.items()) if count}
    outcome = dict(vocab=tok.vocab, licence=source.licence, splits=splits, cut=cut, skipped=skipped)
    write_json(manifest, recipe | outcome)
    progress.unlink(missing_ok=True)
    print(f"{folder.name}: {_summary(outcome)}, {meter.rate:,.0f} tokens/s")


def _summary(manifest: Mapping[str, Any]) -> str:
    splits = [
        f"{split} {size['documents']:,} documents, {size['tokens']:,} tokens, {size['bytes'] / 1e6:,.2f} MB"
        for split, size in manifest["splits"].items()
    ]
    skipped = [f"left out: {count:,} ({fault})" for fault, count in manifest["skipped"].items()]
    return "; ".join(splits + skipped)


class _Meter:
    """A bar with tokens/s; a plain line every ten seconds where there is no terminal."""

    def __init__(self, name: str, size: int | None, done: int):
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
        line = f"{self._name}: {self._tokens:,} tokens, {self.rate:,.0f} tokens/s"
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
    for number, example in enumerate(itertools.islice(train.examples(store, settings), count)):
        console.print(f"row {number}", style="bold underline")
        console.print(display.example(example), soft_wrap=True)


def main(argv: list[str]) -> None:
    """Read the command line and prepare the store of a config."""
    args = config.parse(__doc__ or "", argv, workdir=None, overwrite=False, workers=0, show=0)
    if args.show:
        return show(args.config.to_dict(), args.show)
    section = args.config.get("prepare", ConfigDict()).to_dict()
    if args.workers:
        section["workers"] = args.workers
    spend("config.prepare", prepare, section, args.config.get("store", ""), overwrite=args.overwrite)


if __name__ == "__main__":
    program.run("prepare", main)
