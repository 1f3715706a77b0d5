"""Rules that clean text, one file a rule or a small family; the folder is the registry.

    clean = Cleaner.of(["unicode", dict(name="length", min_words=2), "mypackage.filters.keep"])
    clean("A cafÃ© is open")     Outcome("A café is open", (Step("unicode", "changed", ...), ...)
    clean("Hm")                  Outcome(None, (..., Step("length", "dropped", {"too few words": 1}, ...)))

A file's `rule(*, ...)` spends the keys of its config entry and returns a pure, picklable function of a text, which
answers with the text (perhaps changed), with `Changed` (and what was changed how often), or with `Dropped`. The package
whose rules it applies, if any, is its LIBRARY: its version is kept in the store's manifest. A filter
of one's own is a function named by its dotted name, `filter(text, *, ...)`; it may also answer True (kept) or False.

A document that is longer than `jaxlm.data.sources.PIECE` comes in pieces: each is a text of its own to every rule.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from functools import partial
import hashlib
import importlib
from importlib import metadata
import inspect
import pickle
from typing import Any, NamedTuple

from jaxlm import lookup
from jaxlm.lookup import Mistake

WHERE = "config.prepare.clean"


class Dropped(NamedTuple):
    """A rule's answer to a text that has to go: a reason to count by (of a few), and what was seen in this text."""

    reason: str
    detail: str = ""


class Changed(NamedTuple):
    """A rule's answer with a text and what was changed in it, how often; nothing changed is a text that was kept."""

    text: str
    counts: Mapping[str, int]


Rule = Callable[[str], str | Changed | Dropped]


class Step(NamedTuple):
    """What one rule did to a text: "kept", "changed" or "dropped" it; why, and how many UTF-8 bytes fewer there are."""

    rule: str
    did: str
    why: Mapping[str, int] = {}
    detail: str = ""
    removed: int = 0


class Outcome(NamedTuple):
    """The clean text, None where it was dropped, and the steps up to there."""

    text: str | None
    steps: tuple[Step, ...] = ()

    @property
    def counts(self) -> Counter[str]:
        """For each rule "RULE/kept", "RULE/changed", "RULE/dropped", "RULE/removed" (bytes), "RULE/dropped/REASON" and
        "RULE/changed/WHAT"; those of many texts may be added up.
        """
        found: Counter[str] = Counter()
        for step in self.steps:
            found[f"{step.rule}/{step.did}"] += 1
            found[f"{step.rule}/removed"] += step.removed
            for what, times in step.why.items():
                found[f"{step.rule}/{step.did}/{what}"] += times
        return found


@dataclasses.dataclass(frozen=True)
class Cleaner:
    """Applies rules, (label, rule), in their order; the first that drops a text ends it. Pure and picklable."""

    rules: tuple[tuple[str, Rule], ...] = ()
    recipe: tuple[Mapping[str, Any], ...] = ()  # every rule with all its options: what the outcome depends on

    @classmethod
    def of(cls, entries: Sequence[str | Mapping[str, Any]]) -> "Cleaner":
        """From a list of names, or of options with a `name`; raises `Mistake` for what no rule is or takes."""
        if isinstance(entries, str | Mapping):
            raise Mistake(f'{WHERE} is a list of rules, for example ["unicode", dict(name="gopher")], not {entries!r}')
        rules, recipe, seen = [], [], Counter()
        for entry in entries:
            options = dict(entry) if isinstance(entry, Mapping) else dict(name=entry)
            if not isinstance(name := options.pop("name", None), str):
                raise Mistake(f"{WHERE}: {entry!r} has no name; choices: {', '.join(lookup.names(__name__))}")
            rule, resolved = _own(name, options) if "." in name else _built_in(name, options)
            seen[name] += 1
            rules.append((name if seen[name] == 1 else f"{name}#{seen[name]}", rule))
            recipe.append(dict(name=name, **resolved))
        return cls(tuple(rules), tuple(recipe))

    @property
    def libraries(self) -> dict[str, str]:
        """The libraries whose rules are used, and their versions: with another one, the outcome may be another."""
        modules = [lookup.module(__name__, rule["name"]) for rule in self.recipe if "." not in rule["name"]]
        return {m.LIBRARY: metadata.version(m.LIBRARY) for m in modules if hasattr(m, "LIBRARY")}

    def then(self, label: str, rule: Rule) -> "Cleaner":
        """One more rule at the end, which is no part of the recipe."""
        return dataclasses.replace(self, rules=(*self.rules, (label, rule)))

    def __call__(self, text: str) -> Outcome:
        """Clean a text. Raises `Mistake` for a filter that answers with something else than it may."""
        steps = []
        for label, rule in self.rules:
            step, text_or_none = _apply(label, rule, text)
            steps.append(step)
            if text_or_none is None:
                return Outcome(None, tuple(steps))
            text = text_or_none
        return Outcome(text, tuple(steps))

    def report(self, counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Added-up `Outcome.counts` as they stand in a manifest, one entry a rule."""
        report = {}
        for label, _ in self.rules:
            numbers: dict[str, Any] = {did: counts.get(f"{label}/{did}", 0) for did in ("kept", "changed", "dropped")}
            numbers["bytes_removed"] = counts.get(f"{label}/removed", 0)
            for did, title in (("changed", "changes"), ("dropped", "reasons")):
                prefix = f"{label}/{did}/"
                numbers[title] = {k.removeprefix(prefix): n for k, n in sorted(counts.items()) if k.startswith(prefix)}
            report[label] = numbers
        return report


def _apply(label: str, rule: Rule, text: str) -> tuple[Step, str | None]:
    try:
        answer = rule(text)
    except Mistake:
        raise
    except Exception as e:
        raise Mistake(
            f"{WHERE}: {label} failed with {type(e).__name__} ({e}) at the document that begins {text[:80]!r}"
        ) from e
    if isinstance(answer, bool):  # a filter of one's own
        answer = text if answer else Dropped("unwanted")
    why = {}
    if isinstance(answer, Changed):
        answer, why = answer
    if isinstance(answer, str) and not answer.strip():
        answer = Dropped("nothing left")
    if isinstance(answer, Dropped):
        return Step(label, "dropped", {answer.reason: 1}, answer.detail, len(text.encode())), None
    if not isinstance(answer, str):
        raise Mistake(f"{WHERE}: {label} answered with {type(answer).__name__}; a rule returns str, bool or Dropped")
    if answer == text:
        return Step(label, "kept"), text
    return Step(label, "changed", why, "", len(text.encode()) - len(answer.encode())), answer


def _built_in(name: str, options: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
    make = lookup.module(__name__, name).rule
    rule = lookup.spend(f"{WHERE}: {name}", make, options)
    return rule, {p.name: _plain(options.get(p.name, p.default)) for p in inspect.signature(make).parameters.values()}


def _own(name: str, options: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
    """A function by its dotted name; the recipe holds a digest of its module, so that a change is noticed: of its
    helpers and constants, too.
    """
    where, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as e:
        raise Mistake(f"{WHERE}: {name}: no module {e.name!r}; is its folder on PYTHONPATH?") from None
    functions = {k: v for k, v in vars(module).items() if inspect.isfunction(v) and k[0] != "_"}
    function = lookup.key(f"{WHERE}: {where}", last, functions)
    takes = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    lookup.known(f"{WHERE}: {name}", options, [p.name for p in takes])
    if missing := [p.name for p in takes if p.default is p.empty and p.name not in options]:
        raise Mistake(f"{WHERE}: {name} needs {', '.join(map(repr, missing))}")
    rule = partial(function, **options)
    try:
        pickle.dumps(rule)
    except Exception as e:
        raise Mistake(f"{WHERE}: {name} cannot be sent to a worker process: {e}") from None
    source = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    return rule, dict(source=source, **{k: _plain(v) for k, v in options.items()})


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    return list(value) if isinstance(value, tuple | set | frozenset) else value
