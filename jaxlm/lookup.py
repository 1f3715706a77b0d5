"""A folder is a registry: find a module, a key or a parameter by name; a miss lists the choices and the nearest
spelling.

module("jaxlm.models", "gtp2")   Mistake: jaxlm.models has no 'gtp2'; did you mean 'gpt2'? Choices: gpt2, llama
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import importlib
import inspect
import math
import numbers
import pkgutil
from types import ModuleType, NoneType, UnionType
import typing
from typing import Any


class Mistake(ValueError):
    """Something that the user can mend. Programs print it without a traceback and exit with 2."""


def miss(where: str, name: object, choices: Iterable[str]) -> Mistake:
    """The error for a name that is not among `choices`: names the place, the value, the nearest spelling and all
    choices.
    """
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return Mistake(f"{where} has no {name!r}{hint} Choices: {', '.join(choices) or 'none'}")


def names(package: str) -> list[str]:
    """The modules in a package's folder: its registry. Users write `python-docs` for `python_docs`."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name[0] != "_")


def module(package: str, name: str) -> ModuleType:
    """Import `package.name`; raises `Mistake` when the folder holds no such file."""
    name = str(name).replace("-", "_")
    if name not in names(package):
        raise miss(package, name, names(package))
    return importlib.import_module(f"{package}.{name}")


def key(where: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`; raises `Mistake` on a miss."""
    if name not in table:
        raise miss(where, name, table)
    return table[name]


def spend(where: str, fn: Callable, section: Mapping[str, Any] | None, *given: Any, **more: Any) -> Any:
    """Call `fn(*given, **more, **section)`, where `section` is a part of the config named `where`.

    Raises `Mistake` for a key that `fn` does not take (with the nearest spelling), for a required one that is missing,
    and for a value that is not of the type that `fn` says, so that every key in a config is either used or refused.
    """
    parameters = list(inspect.signature(fn).parameters.values())[len(given) :]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in more]
    section = dict(section or {})
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known(where, section, [p.name for p in named])
    missing = [p.name for p in named if p.default is p.empty and p.name not in section]
    if missing:
        takes = ", ".join(p.name for p in named)
        raise Mistake(f"{where} needs {', '.join(map(repr, missing))}; it takes: {takes}")
    typed(where, fn, section)
    return fn(*given, **more, **section)


def typed(where: str, fn: Callable, section: Mapping[str, Any]) -> None:
    """Raise `Mistake` for the first value in a section that is of none of the types that `fn` says; True is no number.

    An annotation that is not made of plain types takes every value.
    """
    for p in inspect.signature(fn).parameters.values():
        if p.name in section and not _is(section[p.name], p.annotation):
            raise Mistake(f"{where}.{p.name} is {_words(p.annotation)}, not {section[p.name]!r}")


def _is(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(_is(value, one) for one in inner)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind in (None, NoneType):
        return value is None
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(_is(one, inner[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_is(one, inner[1]) for one in value.values())
    return isinstance(value, kind) if kind in (str, bool) else True


def _words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin in (list, Sequence):
        return f"a list, each {_words(inner[0])}"
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", NoneType: "None"}
    return plain.get(kind, "a section" if origin is Mapping else str(kind))


def within(where: str, low: float, high: float = math.inf, **values: float) -> None:
    """Raise `Mistake` for the first number that is not finite, or not between `low` and `high`; they are in it.

    within("config.optimizer.", 0, clip=-1)     Mistake: config.optimizer.clip=-1 is not 0 or more
    """
    for name, value in values.items():
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise Mistake(f"{where}{name}={value} is not {bounds}")


def known(where: str, found: Iterable[str], takes: Iterable[str]) -> None:
    """Raise `Mistake` for the first name in `found` that is not among those that `where` takes."""
    takes = set(takes)
    for name in found:
        if name not in takes:
            raise miss(where, name, takes)


def keywords(fn: Callable) -> set[str]:
    """The names of a function's keyword-only parameters: its options."""
    return {p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY}
