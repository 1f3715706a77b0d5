"""How programs start: what one compiled, the next finds, in a folder of the user's or where the environment says."""

import os
from pathlib import Path
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxlm import program


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """What JAX is told of a cache by a program that starts in this home, after jax was imported."""

    def settings(**environment: str) -> dict:
        with monkeypatch.context() as patch:
            for name in ("JAX_COMPILATION_CACHE_DIR", *(f"JAX_{name.upper()}" for name in program.COMPILED)):
                patch.setenv(name, "to be unset")  # so that what the call sets is taken back
                patch.delenv(name)
            for name, value in {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", **environment}.items():
                patch.setenv(name, value)
            told = {}
            patch.setitem(sys.modules, "jax", SimpleNamespace(config=SimpleNamespace(update=told.__setitem__)))
            program.keep_compiled()
            assert all(os.environ[name.upper()] == str(value) for name, value in told.items())
            return told

    return settings


def test_what_is_compiled_is_kept_in_the_cache_of_the_user(kept, tmp_path):
    told = kept()
    folder = Path(told.pop("jax_compilation_cache_dir"))
    assert folder.parent == tmp_path / ".cache" / "jaxlm" / "compiled" and folder.is_dir()
    assert told == {"jax_compilation_cache_max_size": 2_000_000_000, "jax_persistent_cache_min_compile_time_secs": 0.0}
    assert kept(XDG_CACHE_HOME=str(tmp_path / "x"))["jax_compilation_cache_dir"].startswith(str(tmp_path / "x"))


def test_the_environment_says_where_else_and_how_much_or_that_nothing_is_kept(kept, tmp_path):
    assert kept(JAX_COMPILATION_CACHE_DIR="elsewhere") == kept(JAX_COMPILATION_CACHE_DIR="") == {}
    assert kept(JAX_COORDINATOR_ADDRESS="localhost:1") == {}  # the first of several processes would keep it alone
    assert not list(tmp_path.iterdir())
    assert "jax_compilation_cache_max_size" not in kept(JAX_COMPILATION_CACHE_MAX_SIZE="7")


def test_a_home_that_cannot_be_written_is_no_mistake(kept, tmp_path):
    (tmp_path / ".cache").write_text("no folder")
    assert kept() == {}


def test_what_a_killed_process_left_of_a_program_is_taken_out(tmp_path):
    """JAX would fail on it at every further program that it wants to keep."""
    for name, age in (("whole", 100), ("torn", 100), ("being_written", 0)):
        (tmp_path / f"{name}-cache").write_bytes(b"program")
        os.utime(tmp_path / f"{name}-cache", (time.time() - age,) * 2)
    (tmp_path / "whole-atime").write_bytes(b"now")
    program.drop_torn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime", "being_written-cache"}


def test_devices_without_memory_enough_are_one_line_and_what_to_do(capsys, monkeypatch):
    def main(argv):
        jax.jit(lambda: jnp.ones(1 << 50, jnp.int8))()

    monkeypatch.setattr(program, "ask_for_huge_pages", lambda: None)  # this process must not start again
    monkeypatch.setattr(program, "keep_compiled", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        program.run("train", main, [])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Out of memory" in said and "smaller batch" in said and "Traceback" not in said


def test_a_bucket_that_is_out_of_reach_is_one_line_and_what_to_look_at(capsys, monkeypatch):
    error = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})

    def main(argv):
        raise error("Could not connect to the endpoint URL")

    monkeypatch.setattr(program, "ask_for_huge_pages", lambda: None)
    monkeypatch.setattr(program, "keep_compiled", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        program.run("report", main, [])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Could not connect" in said and "credentials" in said


def test_another_kind_of_processor_has_another_folder(monkeypatch):
    ours = program.compiled_folder()
    monkeypatch.setattr(Path, "read_text", lambda self: "model name : another\nflags : none")
    assert program.compiled_folder() != ours and program.compiled_folder().parent == ours.parent


def test_programs_keep_what_they_compile_and_import_no_plots_and_no_kernels_of_other_devices(tmp_path):
    """Those take a second to import, of the four until a small model's first step."""
    source = """
import sys, jaxlm.train, jax
from jaxlm import program
program.run("train", lambda _: print(jax.jit(lambda x: x + 1)(1), *sys.modules))
"""
    environment = {k: v for k, v in os.environ.items() if "_CACHE_" not in k}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("2 "), done.stderr
    assert not {"matplotlib", "jax.experimental.pallas", "pandas", "torch"} & set(done.stdout.split())
    assert list(tmp_path.glob("jaxlm/compiled/*/jit*-cache"))
