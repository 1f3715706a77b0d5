"""A minimal reproduction: how fast XLA's CPU compiler reads weights and caches for the few rows that decoding has.

    python experiments/xla/few_rows.py       needs jax and numpy alone; two minutes

Each product is one of a row of them with weights of their own (GPT-2 124M's: 768 x 3,072, 24 of them), so that all come
from memory; one line each: microseconds a product and GB/s of weights, beside a plain sum over as many bytes.
"""

from collections.abc import Callable
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_cpu_enable_async_dispatch", False)
K, N, COUNT, HEADS, SLOTS, WIDTH = 768, 3072, 24, 12, 192, 64


def say(name: str, function: Callable, x: jax.Array, held: list[jax.Array]) -> None:
    """Time `function(x, w)` of each w in one program, one after the other."""

    @jax.jit
    def all_of(x, held):
        found = []
        for w in held:
            y = function(x, w)
            x, y = jax.lax.optimization_barrier((x, y))
            found.append(y)
        return found

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(all_of(x, held))
        return time.perf_counter() - start

    once()
    each = statistics.median(once() for _ in range(15)) / len(held)
    print(f"{name:44s} {each * 1e6:7.0f} us {held[0].nbytes / each / 1e9:6.1f} GB/s", flush=True)


def product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def main() -> None:
    rng = np.random.default_rng(0)
    print("jax", jax.__version__)
    wide = [rng.standard_normal((K, N), np.float32) for _ in range(COUNT)]
    for dtype in ("float32", "bfloat16"):
        across = [jnp.asarray(w, dtype) for w in wide]
        along = [jnp.asarray(w.T.copy(), dtype) for w in wide]
        say(f"sum, {dtype}", lambda _, w: w.astype(jnp.float32).sum(), jnp.zeros(()), across)
        for rows in (1, 2, 8, 32):
            x = jnp.asarray(rng.standard_normal((rows, K)), dtype)
            say(f"{rows} rows, weights [768, 3072], {dtype}", functools.partial(product, axis=0), x, across)
            say(f"{rows} rows, weights [3072, 768], {dtype}", functools.partial(product, axis=1), x, along)
    for batch in (1, 8, 32):  # a query of each head against its keys: 12 heads of 64, 192 slots
        keys = [jnp.asarray(rng.standard_normal((batch * HEADS, SLOTS, WIDTH)), jnp.float32) for _ in range(COUNT)]
        for queries in (1, 2):
            x = jnp.asarray(rng.standard_normal((batch * HEADS, queries, WIDTH)), jnp.float32)
            say(f"{batch} rows, {queries} queries a head, keys in float32",
                lambda x, w: jnp.einsum("bth,bsh->bts", x, w), x, keys)  # fmt: skip


if __name__ == "__main__":
    main()
