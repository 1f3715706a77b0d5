"""Two kernels in C++ for decoding on a CPU, which the machine's own compiler makes when they are first asked for.

    native.ready()                            whether there is such a compiler, and this is a CPU
    product(x_MK, tile(w_KN), N)              [M, N], of a few rows with bfloat16 weights
    attend(q_BKRH, bits(k), bits(v), more)    [B, K, R, H], of a few queries with a bfloat16 cache

XLA packs a matrix of bfloat16s anew for every product with several rows, widens one before a product with a single row,
and makes ten operations of attention. Here the weights and the cache are read once, as they lie, by all threads of
XLA's pool. Without a compiler XLA's products are left, a token takes two to two and a half times as long, and a warning
says so. CXX names another compiler than `c++`, and none where it is empty; one from pip will do: `pip install ziglang`,
CXX="python -m ziglang c++".
"""

import contextlib
import ctypes
import functools
import hashlib
from importlib import metadata
import logging
import os
from pathlib import Path
import shlex
import subprocess
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes, program

SOURCE = Path(__file__).with_suffix(".cc")
# Sums in any order, which vector instructions need; a NaN stays one.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
LANES = 16  # columns of a block of weights
KERNELS = ("jaxlm_product", "jaxlm_attend")

log = logging.getLogger("jaxlm")
_one_at_a_time = threading.Lock()  # of several threads each would register kernels of its own


def ready() -> bool:
    """Whether the kernels can be called here. The first time they are compiled, in a few seconds, and kept for the next
    start where JAX keeps its programs, else in `program.compiled_folder`.
    """
    with _one_at_a_time:
        return axes.platform() == "cpu" and _loaded()


@functools.cache
def _loaded() -> bool:
    try:
        library = _library()
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        told = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else ""
        log.warning(
            "no kernels from a C++ compiler, so this CPU decodes slower; CXX can name one (jaxlm/nn/native.py): %s",
            told or e,
        )
        return False
    for name in KERNELS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _library() -> ctypes.CDLL:
    """The kernels, of an earlier start or made now. Raises OSError, ValueError or SubprocessError where that fails."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler:
        raise FileNotFoundError("CXX is empty")
    what = repr((SOURCE.read_bytes(), compiler, FLAGS, metadata.version("jaxlib"), program.processor()))
    folder, name = _folder(), f"native-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if folder is not None:
        with contextlib.suppress(OSError):  # there is none, or another system made it, whose libraries are newer
            return ctypes.CDLL(str(folder / name))
    with _room(folder) as new:  # so that nobody finds half of it
        output = Path(new) / name
        command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300)
        library = ctypes.CDLL(str(output))
        if folder is not None:
            with contextlib.suppress(OSError):  # it is read only
                output.replace(folder / name)
    return library


def _folder() -> Path | None:
    """Where the library is kept; None where nothing is."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named == "" or "://" in str(named):
        return None
    try:
        return Path(named).absolute() if named else program.compiled_folder()
    except RuntimeError:  # there is no home
        return None


def _room(folder: Path | None) -> tempfile.TemporaryDirectory:
    """A folder for what is being made: in that one, or elsewhere where it cannot be written."""
    with contextlib.suppress(OSError):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder)
    return tempfile.TemporaryDirectory()


def tile(matrix: np.ndarray) -> np.ndarray:
    """[K, N] in any dtype -> uint32 [N / LANES, K / 2, LANES]: blocks of columns with two bfloat16s in each word, that
    of the lower row in its lower half. Behind the last row and column are zeros.
    """
    K, N = matrix.shape
    rows = np.pad(matrix.astype(jnp.bfloat16).view(np.uint16), ((0, K % 2), (0, -N % LANES)))
    words = rows[0::2] | rows[1::2].astype(np.uint32) << np.uint32(16)
    return np.ascontiguousarray(words.reshape(len(words), -1, LANES).swapaxes(0, 1))


def product(x_MK: jax.Array, tiles: jax.Array, columns: int) -> jax.Array:
    """Bfloat16 rows with weights that `tile` laid out: [M, columns] in float32, and summed in it. Under `vmap`, one
    after the other.
    """
    x_MK = jnp.pad(x_MK, ((0, 0), (0, 2 * tiles.shape[1] - x_MK.shape[1])))
    result = jax.ShapeDtypeStruct((len(x_MK), columns), jnp.float32)
    return jax.ffi.ffi_call("jaxlm_product", result, vmap_method="sequential")(x_MK, tiles)


def bits(x: jax.Array) -> jax.Array:
    """The bits of x's bfloat16s. As such a cache is held, since XLA widens all of an array of bfloat16s to write one
    token to it.
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def attend(
    q_BKRH: jax.Array, keys: jax.Array, values: jax.Array, more: jax.Array, cap: float | None = None
) -> jax.Array:
    """Softmax(bend(q k) + more) v, [B, K, R, H] in float32, with bend(x) = cap tanh(x / cap) where a `cap` is given.

    Keys and values are `bits` [B, K, S, H]; `more` [B or 1, K or 1, R or 1, S] is added to the scores.
    What is less than -1e29 there hides a key: those before the first and behind the last that is seen are not read.
    """
    call = jax.ffi.ffi_call("jaxlm_attend", jax.ShapeDtypeStruct(q_BKRH.shape, jnp.float32))
    return call(q_BKRH.astype(jnp.float32), keys, values, more.astype(jnp.float32), cap=np.float32(cap or 0))
