"""Configs and flags: `--config=FILE[:size]`, `--config.a.b=value`, `--workdir=DIR`, and a program's own flags.

    args = parse(__doc__, argv, data="", stride=256)      args.config, args.workdir, args.data, args.stride
"""

from collections.abc import Callable, Sequence
import json
import sys
from types import SimpleNamespace
from typing import Any

from absl import flags
from absl.flags import UnparsedFlagAccessError
from etils import epath
from ml_collections import ConfigDict, config_flags

from jaxlm.lookup import Mistake, miss

DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def parse(doc: str, argv: Sequence[str], *, config: bool = True, workdir: str | None = "required", **own: Any) -> SimpleNamespace:
    """Read a program's arguments: its own flags are given by name and default (a list: may be repeated; a type: no default).

    Raises `Mistake` for an unknown flag or config key (with the nearest spelling), a bad value, or a missing required flag;
    prints the program's docstring and flags and exits on --help.
    """
    values = flags.FlagValues()
    if config:
        config_flags.DEFINE_config_file("config", None, "FILE.py[:size]; change a key by --config.a.b=value", flag_values=values)
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
        print(doc.strip() + "\n\nFlags:\n" + "\n".join(f"  --{n:24}{_about(values[n])}" for n in sorted(own) + ["workdir"] * bool(workdir) + ["config"] * config))
        sys.exit(0)
    rest = _read_flags(values, argv, config)
    if rest:
        raise Mistake(f"unexpected argument {rest[0]!r}; flags are written --name=value")
    if config and values["config"].value is None:
        raise Mistake("--config is missing: --config=FILE.py[:size], for example --config=configs/quickstart.py")
    if workdir == "required" and not values["workdir"].value:
        raise Mistake("--workdir is missing: the folder that will hold the run, for example --workdir=runs/first")
    return SimpleNamespace(**{name: values[name].value for name in values if name in {"config", "workdir", *own}})


def _about(flag: flags.Flag) -> str:
    return " ".join(filter(None, [flag.help, f"(default {flag.value!r})" if flag.value not in (None, "", []) else ""]))


def _read_flags(values: flags.FlagValues, argv: Sequence[str], config: bool) -> list[str]:
    sys_argv, sys.argv = sys.argv, ["jaxlm", *argv]  # config_flags looks there for the overrides
    try:
        return values(["jaxlm", *argv])[1:]
    except flags.UnrecognizedFlagError as e:
        name = e.flagname
        if name.startswith("config.") and config and values["config"].value is not None:
            raise _unknown_key(values["config"].value, name) from None
        raise miss("the command", "--" + name, ["--" + n for n in values if n not in ("?", "help", "helpfull", "helpshort", "helpxml")]) from None
    except (FileNotFoundError, ModuleNotFoundError) as e:
        raise Mistake(f"--config: {e}") from None
    except (flags.Error, UnparsedFlagAccessError, AttributeError, KeyError, TypeError, ValueError) as e:
        for arg in argv:
            name = arg.partition("=")[0].lstrip("-")
            if name.startswith("config.") and values["config"].value is not None and not _has(values["config"].value, name):
                raise _unknown_key(values["config"].value, name) from None
        raise Mistake(f"{type(e).__name__}: {e}" if not isinstance(e, ValueError | flags.Error) else str(e)) from None
    finally:
        sys.argv = sys_argv


def _has(config: ConfigDict, name: str) -> bool:
    section: Any = config
    for part in name.split(".")[1:]:
        if not isinstance(section, ConfigDict) or part not in section:
            return False
        section = section[part]
    return True


def _unknown_key(config: ConfigDict, name: str) -> Mistake:
    """`config.optim.lrr`: the section where the path breaks, its nearest key and all of its keys."""
    section, where = config, "config"
    for part in name.split(".")[1:]:
        if part not in section:
            return miss(where, part, section.keys())
        section, where = section[part], f"{where}.{part}"
        if not isinstance(section, ConfigDict):
            return Mistake(f"{name}: {where} is a value ({section!r}), no section")
    return Mistake(f"{name}: cannot be set")


def write(config: ConfigDict, workdir: str) -> None:
    """Leave the resolved config in the workdir, so that the folder explains itself."""
    text = json.dumps(json.loads(config.to_json_best_effort()), indent=1)
    (epath.Path(workdir) / "config.json").write_text(text + "\n")


def read(workdir: str) -> ConfigDict:
    """The config that a workdir was trained with. Raises `Mistake` when the folder is no workdir."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise Mistake(f"{workdir} is no workdir: it has no config.json (a workdir is what `jaxlm train --workdir` writes)")
    return ConfigDict(json.loads(path.read_text()))


def run(name: str, main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a program and exit: a `Mistake` is printed without a traceback and exits with 2."""
    try:
        sys.exit(main(list(sys.argv[1:] if argv is None else argv)))
    except Mistake as e:
        print(f"jaxlm {name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"jaxlm {name}: interrupted", file=sys.stderr)
        sys.exit(130)
