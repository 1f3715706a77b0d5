"""Configs and flags: `--config=FILE[:size]`, `--config.a.b=value`, `--workdir=DIR`, and a program's own flags.

    args = parse(__doc__, argv, data="", stride=256)      args.config, args.workdir, args.data, args.stride

A config file defines `get_config(size)`, which returns an `ml_collections.ConfigDict`. Any key can be set from the
command line, also one that the file leaves at its default; whoever spends a section refuses what it does not know
(`jaxlm.lookup.spend`).
"""

import ast
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import runpy
import sys
from types import SimpleNamespace
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from jaxlm import paths
from jaxlm.lookup import Mistake, miss

KEYS = (  # of a config's top level; `distributed` is the program's own, the others `jaxlm.train.train`'s
    "seed", "store", "prepare", "data", "model", "objective", "optimizer", "steps", "batch", "length", "accumulate",
    "ema", "dtype", "mesh", "pipeline", "rules", "distributed", "guard", "every", "evaluation", "checkpoint", "samples",
    "init",
)  # fmt: skip
DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def parse(
    doc: str, argv: Sequence[str], *, config: bool = True, workdir: str | None = "required", places: int = 0, **own: Any
) -> SimpleNamespace:
    """Read a program's arguments: its own flags are given by name and default (a list: may be repeated; a type: no
    default). Up to so many `places` may stand without a name; they come as `args.places`.

    Raises `Mistake` for an unknown flag or config key (with the nearest spelling), a bad value, or a missing required
    flag; prints the program's docstring and flags and exits on --help.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(places > 0)  # flags may follow what has no name
    if config:
        flags.DEFINE_string("config", None, "FILE.py[:size]; set any key by --config.a.b=value", flag_values=values)
    if workdir:
        flags.DEFINE_string("workdir", None, f"folder of the run ({workdir})", flag_values=values)
    for name, default in own.items():
        kind = default if isinstance(default, type) else type(default)
        value = None if isinstance(default, type) else default
        if kind is list:
            flags.DEFINE_multi_string(name, value or [], "may be repeated", flag_values=values)
        else:
            DEFINE[kind](name, value, "", flag_values=values)
    if {"--help", "-help", "-h"} & set(argv):
        print(doc.strip() + "\n\nFlags:\n" + "\n".join(f"  --{name:23} {_about(values[name])}" for name in values))
        sys.exit(0)

    overrides = [a.lstrip("-") for a in argv if config and a.lstrip("-").startswith("config.")]
    try:
        rest = values(["jaxlm", *(a for a in argv if a.lstrip("-") not in overrides)])[1:]
    except flags.UnrecognizedFlagError as e:
        raise miss("the command", "--" + e.flagname, ["--" + name for name in values]) from None
    except flags.Error as e:
        raise Mistake(str(e)) from None
    if len(rest) > places:
        raise Mistake(f"unexpected argument {rest[places]!r}; flags are written --name=value")
    if workdir == "required" and not values["workdir"].value:
        raise Mistake("--workdir is missing: the folder that will hold the run, for example --workdir=runs/first")
    paths.check("--workdir", values["workdir"].value or "" if workdir else "")
    found: dict[str, Any] = {name: values[name].value for name in values} | ({"places": rest} if places else {})
    if config:
        found["config"] = load(found["config"] or "", overrides)
    return SimpleNamespace(**found)


def _about(flag: flags.Flag) -> str:
    default = f"(default {flag.value})" if flag.value not in (None, "", []) else ""
    return " ".join(filter(None, [(flag.help or "").replace("(no help available)", ""), default]))


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, `configs/quickstart.py` or `configs/quickstart.py:tiny`, with keys changed by
    `config.a.b=value`.

    Raises `Mistake` for a file that is none, and for a key or a value that the config cannot take.
    """
    file, colon, size = path.rpartition(":") if ".py:" in path else (path, "", "")
    if not Path(file).is_file():
        there = ", ".join(sorted(map(str, Path("configs").rglob("*.py")))) or "none"
        raise Mistake(f"--config={path or '(missing)'}: no such file; it is FILE.py[:size]. Configs here: {there}")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise Mistake(f"--config={path}: the file defines no function get_config")
    try:
        config = get_config(size) if colon else get_config()
    except KeyError as e:  # by convention: c.steps = {"full": 2_000, "tiny": 2}[size]
        raise Mistake(f"--config={path}: the file knows no size {e}") from None
    for override in overrides:
        _set(config, *override.partition("=")[::2])
    for key in config:
        if key not in KEYS:
            raise miss("config", key, KEYS)
    paths.check("config.store", str(config.get("store", "")))
    return config


def _set(config: ConfigDict, name: str, text: str) -> None:
    """Set `config.a.b` to what the text says, in the type that the key has."""
    *sections, key = name.split(".")[1:]
    for section in sections:
        if section not in config or config[section] is None:
            config[section] = ConfigDict()
        inner = config[section]
        if not isinstance(inner, ConfigDict):
            raise Mistake(f"--{name}: {section} is a value ({inner!r}), no section")
        config = inner
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    old = config.get(key)
    if isinstance(old, str) and value is not None:
        value = text
    try:
        config[key] = value
    except TypeError:
        raise Mistake(f"--{name}={text}: expected a {type(old).__name__} such as {old!r}") from None


def write(settings: Mapping[str, Any], workdir: str) -> None:
    """Leave the resolved config in the workdir, so that the folder explains itself."""
    (epath.Path(workdir) / "config.json").write_text(json.dumps(settings, indent=1, default=dict) + "\n")


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `Mistake` where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise Mistake(f"{path} is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise Mistake(f"{path} holds no JSON object")
    return found


def read(workdir: str) -> ConfigDict:
    """The config that a workdir was trained with. Raises `Mistake` when the folder is no workdir, or its config is
    damaged.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise Mistake(
            f"{workdir} is no workdir: it has no config.json (a workdir is what `jaxlm train --workdir` writes)"
        )
    return ConfigDict(read_json(path))
