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


def ready() -> bool:
    """Whether the kernels can be called here. The first time they are compiled, in a few seconds, and kept for the next
    start where JAX keeps its programs, else in `program.compiled_folder`.
    """
    return axes.platform() == "cpu" and _loaded()


@functools.cache
def _loaded() -> bool:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as e:
        told = (getattr(e, "stderr", None) or str(e)).strip()
        log.warning("no C++ compiler, so this CPU decodes slower; CXX can name one (jaxlm/nn/native.py): %s", told)
        return False
    for name in KERNELS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _compiled() -> Path:
    """The library, from an earlier start or made now. Raises OSError or SubprocessError where that fails."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler:
        raise FileNotFoundError("CXX is empty")
    what = repr((SOURCE.read_bytes(), FLAGS, metadata.version("jaxlib"), program.processor()))
    library = _folder() / f"native-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as new:  # so that nobody finds half of it
            output = Path(new) / library.name
            command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            output.replace(library)
    return library


def _folder() -> Path:
    """Where the library is kept; a folder of this process alone where nothing is."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        folder = Path(named) if named else program.compiled_folder()
        if named != "" and "://" not in str(named):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    except (OSError, RuntimeError):  # it is read only, or there is no home
        pass
    return Path(tempfile.mkdtemp(prefix="jaxlm-"))


def tile(matrix: np.ndarray) -> np.ndarray:
    """[K, N] in any dtype -> uint32 [N / LANES, K / 2, LANES]: blocks of columns with two bfloat16s in each word, that
    of the lower row in its lower half. Behind the last row and column are zeros.
    """
    K, N = matrix.shape
    rows = np.pad(matrix.astype(jnp.bfloat16).view(np.uint16), ((0, K % 2), (0, -N % LANES)))
    words = rows[0::2] | rows[1::2].astype(np.uint32) << np.uint32(16)
    return np.ascontiguousarray(words.reshape(len(words), -1, LANES).swapaxes(0, 1))


def product(x_MK: jax.Array, tiles: jax.Array, columns: int) -> jax.Array:
    """Bfloat16 rows with weights that `tile` laid out: [M, columns] in float32, and summed in it."""
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
