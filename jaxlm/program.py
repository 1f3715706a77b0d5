"""How a program starts and ends: huge pages before, one clear line instead of a traceback after.

    run("train", main)

Nothing here imports jax, so that `jaxlm` may start again before anything slow was loaded.
"""

from collections.abc import Callable, Sequence
import errno
import hashlib
import os
from pathlib import Path
import platform
import sys
import tempfile
import time

from jaxlm.lookup import Mistake

COMPILED = {  # JAX's own settings, unless the environment has them
    "compilation_cache_max_size": 2_000_000_000,  # bytes; what was longest not used goes; also makes JAX lock the files
    "persistent_cache_min_compile_time_secs": 0.0,  # many small programs come before the first step
}
HUGE_PAGES = "glibc.malloc.hugetlb=1"
CLOUDS = {"gcsfs": "gcs", "s3fs": "s3"}  # what opens gs:// and s3://, and the extra that brings it
REACH = ("aiohttp", "botocore", "gcsfs", "google", "s3fs")  # whose errors are about a bucket


def ask_for_huge_pages() -> None:
    """Start this process again, once, with malloc asking Linux for huge pages where it hands them out on request.

    XLA on a CPU takes the buffers of each step from malloc and gives them back. In pages of 4 kB their page faults are
    a fifth to a third of a training step (`experiments/LOG.md`). malloc reads this setting when a process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "glibc.malloc.hugetlb" in tunables or not setting.exists() or "[madvise]" not in setting.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}".lstrip(":")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cores() -> int:
    """The cores that this process may use, where the system tells: those it may run on, or fewer in a container whose
    share of the time is less.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return found
    return min(found, max(1, quota // period))


def processor() -> str:
    """What tells this kind of processor from others: one may run what another cannot."""
    try:
        told = Path("/proc/cpuinfo").read_text().splitlines()
        kind = "".join(sorted({line for line in told if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        kind = " ".join(platform.uname())
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def compiled_folder() -> Path:
    """Where a program keeps what it compiled for its next start: ~/.cache/jaxlm/compiled, or under XDG_CACHE_HOME. Each
    kind of processor has a folder of its own there, since homes are shared.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "jaxlm" / "compiled" / processor()


def keep_compiled() -> None:
    """Have JAX keep what it compiles in `compiled_folder`, where that can be written.

    JAX_COMPILATION_CACHE_DIR names another place, and none where it is empty. Of several processes only the first would
    write, so that the others compile anyway; there is no cache then, unless that variable names one that they share.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "JAX_COORDINATOR_ADDRESS" in os.environ:
        return
    try:
        folder = compiled_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        drop_torn(folder)
    except (OSError, RuntimeError):  # a home that is read only, or none
        return
    for name, value in {"compilation_cache_dir": str(folder), **COMPILED}.items():
        if f"JAX_{name.upper()}" not in os.environ:
            os.environ[f"JAX_{name.upper()}"] = str(value)
            if "jax" in sys.modules:  # which read the environment before, as in `python -m jaxlm.train`
                sys.modules["jax"].config.update(f"jax_{name}", value)


def drop_torn(folder: Path) -> None:
    """Take out of a folder of compiled programs what a killed process left there without its time of use: JAX fails on
    it whenever it wants to write another one. Nothing of the last minute, which may still be written.
    """
    for path in folder.glob("*-cache"):
        used = path.with_name(path.name.removesuffix("cache") + "atime")
        if not used.exists() and path.exists() and time.time() - path.stat().st_mtime > 60:
            path.unlink(missing_ok=True)


def run(name: str, main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a program and exit. A `Mistake` is printed without a traceback and exits with 2; a full disk likewise,
    whoever met it first: a save in the background, the metrics, the token store.
    """
    ask_for_huge_pages()
    keep_compiled()
    try:
        sys.exit(main(list(sys.argv[1:] if argv is None else argv)))
    except Mistake as e:
        print(f"jaxlm {name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"jaxlm {name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except ImportError as e:
        extra = next((extra for package, extra in CLOUDS.items() if package in str(e)), None)
        if not extra:
            raise
        print(f'jaxlm {name}: {e}; for jaxlm: pip install "jaxlm[{extra}]"', file=sys.stderr)
        sys.exit(2)
    except Exception as e:
        if told := _told(e):
            print(f"jaxlm {name}: {told}", file=sys.stderr)
            sys.exit(2)
        if not is_disk_full(e):
            raise
        print(
            f"jaxlm {name}: the disk is full: the last write was cut short; what was finished before is intact. "
            "Free some space and run the same command again",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: threads of Orbax and TensorBoard that still write would only add tracebacks


def output(flag: str, path: str) -> None:
    """Raise `Mistake` where no file can be written at `path`, before the work that it is to hold."""
    place, fault = Path(path), None
    if "://" in path:
        return  # who may write there is known to the bucket alone
    if place.is_dir():
        fault = "it is a folder; name a file in it"
    elif not place.parent.is_dir():
        fault = f"there is no folder {place.parent}"
    elif not os.access(place if place.exists() else place.parent, os.W_OK):
        fault = "it may not be written"
    if fault:
        raise Mistake(f"{flag}={path}: {fault}")


def _told(e: Exception) -> str:
    """What to say of an error that comes from outside; "" for what only its traceback can tell."""
    first = (str(e) or type(e).__name__).splitlines()[0]
    if type(e).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(e):
        return (
            f"{first}\nThe devices have not memory enough; what was saved before is intact. Try a smaller batch or "
            "length, in training more config.accumulate or config.model.remat=full, or more devices; `jaxlm plan` "
            "tells what a config needs"
        )
    if type(e).__module__.partition(".")[0] in REACH:
        return (
            f"{first}\nThe bucket cannot be reached, or not with these rights: see its address, the network, and the "
            "credentials of this machine. What was finished before is intact"
        )
    return ""


def is_disk_full(e: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that no space is left (TensorStore says so in words)."""
    seen: set[int] = set()
    while e is not None and id(e) not in seen:
        seen.add(id(e))
        words = ("No space left", "ENOSPC", "Disk quota exceeded")
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(e) for word in words):
            return True
        e = e.__cause__ or e.__context__
    return False
