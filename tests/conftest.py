"""Strict flags for every test, set before anything imports jax; programs that a test starts inherit them."""

from collections.abc import Iterator
import gc
from importlib import metadata
import os
from pathlib import Path
import sys
import tempfile

from hypothesis import settings
import pytest

# Tiny programs: compiling them is what takes the time, and the older emitters compile them a third faster.
FLAGS = ["--xla_backend_optimization_level=0"]
if metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag, and die of it
    # ... and each in one piece, since two processes of tests have two cores between them
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]

for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",  # a mesh on any machine
    "JAX_NUMPY_RANK_PROMOTION": "raise",  # x_TD + y_D must say so
    "XLA_FLAGS": " ".join(FLAGS),
    "JAX_COMPILATION_CACHE_DIR": "",  # nothing is left in a home (scripts/test.sh names a folder)
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google itself; read when gcsfs is first imported
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu compiles for a TPU that is not there ...
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # ... in several processes at once
}.items():
    os.environ.setdefault(name, value)

if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    from jaxlm import program  # not before the flags are set

    program.drop_torn(Path(folder))
gc.set_threshold(200_000, 20, 100)  # tracing makes heaps of small objects: by default a tenth of the time is spent here

settings.register_profile("house", deadline=None)  # the first example compiles
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What libraries and programs leave behind goes where pytest clears up."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("t"))


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A program that a failed test leaves running would disturb all that come after it."""
    yield
    if runs := sys.modules.get("tests.runs"):  # not before the flags are set, and where it is used
        for process in runs.Started.running:
            process.kill()
            process.wait()
        runs.Started.running.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one family or golden go to one process (`--dist loadgroup`): what they share is compiled once."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")  # type: ignore[attr-defined]
        if isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}:{name}"))
