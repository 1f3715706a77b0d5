"""The laws of the house (CONTRIBUTING.md), kept by machine where a machine can."""

import ast
from importlib import metadata
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LONG_FILES: dict[str, str] = {}  # path -> why it may have more than 400 lines
LONG_FUNCTIONS = {"jaxlm/train.py:train": "the training program, to be read from top to bottom"}
FORBIDDEN_NAMES = {"utils", "util", "common", "misc", "base", "helpers", "core"}


def tree() -> list[Path]:
    """Every file of the repository that is text: tracked, or new and not ignored."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout: which files are the repository's is not known")
    files = [ROOT / name for name in sorted(set(git.stdout.splitlines()))]
    return [f for f in files if f.is_file() and not f.is_symlink() and b"\0" not in f.read_bytes()[:4096]]


def python(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offenders(paths, law) -> list[str]:
    return [name(path) for path in paths if not law(path)]


def test_a_file_is_read_in_one_sitting():
    long = {name(f) for f in python("jaxlm", "tests", "configs", "scripts") if f.read_text().count("\n") > 400}
    assert long == set(LONG_FILES), "ask which two things it is, or name it in LONG_FILES with the reason"


def test_a_function_fits_a_screen():
    long = {}
    for file in python("jaxlm"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 70:
                long[f"{name(file)}:{node.name}"] = length
    assert long.keys() <= LONG_FUNCTIONS.keys(), long


def test_no_file_is_named_after_nothing():
    assert not offenders(python("jaxlm", "tests", "scripts"), lambda f: f.stem not in FORBIDDEN_NAMES)


def test_every_module_says_in_its_first_sentence_what_it_is():
    def says(file: Path) -> bool:
        text, doc = file.read_text(), ast.get_docstring(ast.parse(file.read_text()))
        return bool(doc and doc.split("\n\n")[0].rstrip().endswith((".", ":", "?"))) or (
            file.name == "__init__.py" and not text.strip()
        )

    assert not offenders(python("jaxlm", "configs", "scripts"), says)


def test_every_public_function_says_what_it_does():
    silent = []
    for file in python("jaxlm"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and not ast.get_docstring(node):
                silent.append(f"{name(file)}:{node.name}")
    assert not silent


def test_a_config_tells_its_command_and_what_it_measured():
    """Or its first line says `not measured`: no config pretends."""

    def tells(file: Path) -> bool:
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        measured = re.search(r"\d (s|min|h)\b", doc) and re.search(r"\d\.\d", doc)
        return f"--config={name(file)}" in doc and bool(measured or "not measured" in doc.split("\n")[0])

    configs = [f for f in python("configs") if f.name != "__init__.py"]
    assert not offenders(configs, tells)


def test_no_merge_was_left_half_done():
    marks = re.compile(rf"^({'<' * 7}|{'>' * 7})( |$)", re.MULTILINE)
    assert not [name(path) for path in tree() if marks.search(path.read_text(errors="ignore"))]


def test_the_tree_names_no_machine_and_no_index():
    words = [
        "py" + "pi.org",
        "python" + "hosted",
        "index" + "-url=",
        "/ro" + "ot/",
        "/wo" + "rk/",
        "/op" + "t/",
        "/ho" + "me/",
    ]
    pattern = re.compile("|".join(re.escape(w) for w in words))
    assert not offenders(tree(), lambda f: not pattern.search(f.read_text(errors="replace")))


def test_data_is_prepared_and_told_without_jax():
    """In a process where jax cannot be imported, every module of these packages can."""
    program = """
import sys, importlib, pkgutil
sys.modules["jax"] = sys.modules["jaxlib"] = None
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        importlib.import_module(module.name)
"""
    packages = ["jaxlm.report", "jaxlm.prepare", "jaxlm.data"]
    done = subprocess.run([sys.executable, "-c", program, *packages], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_jaxlm_imports_is_what_it_depends_on():
    """At module level, so that an optional package costs nothing until it is asked for."""
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    owners = metadata.packages_distributions()
    strangers = set()
    for file in python("jaxlm"):
        for node in ast.parse(file.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for top in {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"jaxlm"}:
                if not {canonicalize_name(d) for d in owners.get(top, [top])} & declared:
                    strangers.add(f"{name(file)}: {top}")
    assert not strangers


# The lock files.


def pins(lock: str) -> dict[str, list[tuple[Requirement, str]]]:
    """package -> [(requirement, its hashes)], one for each Python that needs its own version."""
    found: dict[str, list] = {}
    for block in re.split(r"\n(?=\S)", (ROOT / "requirements" / f"{lock}.txt").read_text()):
        if block.strip() and not block.startswith("#"):
            requirement, _, hashes = block.partition(" \\\n")
            parsed = Requirement(requirement)
            found.setdefault(canonicalize_name(parsed.name), []).append((parsed, hashes))
    return found


@pytest.mark.parametrize("lock", ["core", "test", "tpu"])
def test_the_lock_pins_everything_by_hash_and_names_no_index(lock):
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert "://" not in text and not re.search(r"^\s*-(?!-hash)", text, re.MULTILINE)
    for package, versions in pins(lock).items():
        for requirement, hashes in versions:
            assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), package
            assert re.fullmatch(r"(\s*--hash=sha256:[0-9a-f]{64}\s*\\?)+", hashes), package


@pytest.mark.parametrize("lock", ["core", "test", "tpu"])
def test_the_lock_allows_no_accelerator_builds_of_other_frameworks(lock):
    assert not [package for package in pins(lock) if re.match(r"torch|nvidia|cuda|tensorflow($|-cpu|-gpu)", package)]


def test_the_lock_is_what_the_project_asks_for():
    core = pins("core")
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        versions = core.get(canonicalize_name(wanted.name), [])
        assert versions, f"{wanted.name} is not locked; run scripts/lock.sh"
        assert all(next(iter(pin.specifier)).version in wanted.specifier for pin, _ in versions), wanted
    for lock in ("test", "tpu"):
        larger = pins(lock)
        for package, versions in core.items():
            held = {str(pin.specifier) for pin, _ in larger.get(package, [])}
            assert {str(pin.specifier) for pin, _ in versions} == held, (
                f"{package}: the {lock} lock must contain the core's"
            )


# The scripts.


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_a_script_stops_at_the_first_error(script):
    path = ROOT / "scripts" / script
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.fixture
def bare(tmp_path):
    """A copy of what set-up needs, and a way to run it with a `python3` that is a shell script."""
    for item in ("scripts", "requirements", "pyproject.toml"):
        (shutil.copytree if (ROOT / item).is_dir() else shutil.copy)(ROOT / item, tmp_path / item)

    def setup(python3: str) -> str:
        fakes = tmp_path / "bin"
        fakes.mkdir()
        for python in ("python3", "python3.11", "python3.12", "python3.13", "python3.14", "python"):
            (fakes / python).write_text("#!/bin/sh\n" + python3)
            (fakes / python).chmod(0o755)
        environment = {"PATH": f"{fakes}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", tmp_path / "scripts/setup.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    return setup


def test_an_old_python_is_named(bare):
    said = bare('[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    assert "needs Python 3.11 or newer" in said and "3.9.2" in said and "PYTHON=" in said


def test_a_missing_venv_module_is_named(bare):
    assert "python3-venv" in bare('[ "$2" = venv ] && exit 1\nexit 0\n')
