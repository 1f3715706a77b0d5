"""How a program starts and ends: huge pages before, one clear line instead of a traceback after.

    run("train", main)

Nothing here imports jax, so that `jaxlm` may start again before anything slow was loaded.
"""

from collections.abc import Callable, Sequence
import errno
import os
from pathlib import Path
import sys

from jaxlm.lookup import Mistake

HUGE_PAGES = "glibc.malloc.hugetlb=1"
CLOUDS = {"gcsfs": "gcs", "s3fs": "s3"}  # what opens gs:// and s3://, and the extra that brings it


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


def run(name: str, main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a program and exit. A `Mistake` is printed without a traceback and exits with 2; a full disk likewise,
    whoever met it first: a save in the background, the metrics, the token store.
    """
    ask_for_huge_pages()
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
        if is_out_of_memory(e):
            print(
                f"jaxlm {name}: {str(e).splitlines()[0]}\nThe devices have not memory enough; what was saved before is "
                "intact. Try a smaller batch or length, in training more config.accumulate or config.model.remat=full, "
                "or more devices; `jaxlm plan` tells what a config needs",
                file=sys.stderr,
            )
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


def is_out_of_memory(e: BaseException) -> bool:
    """Whether XLA says that a device has no room."""
    return type(e).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(e)


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
