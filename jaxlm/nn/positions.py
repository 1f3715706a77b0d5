"""Where a token stands: rotary embeddings, and positions that restart with every document.

restart(segments [1 1 1 2 2 0])  ->  [0 1 2 0 1 0]
"""

import jax
import jax.numpy as jnp

from jaxlm.axes import shaped
from jaxlm.nn.cache import Cache


@shaped
def restart(segments_BT: jax.Array) -> jax.Array:
    """Positions [B, T] that count from 0 within each run of equal segment numbers."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    fresh_BT = jnp.concatenate([jnp.ones_like(segments_BT[:, :1]), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    return index_BT - jax.lax.cummax(jnp.where(fresh_BT > 0, index_BT, 0), axis=1)


def of(tokens_BT: jax.Array, segments_BT: jax.Array | None = None, cache: Cache | None = None) -> jax.Array:
    """Positions [B, T] of tokens: behind what the cache holds, or restarting with each segment, or from 0."""
    if segments_BT is not None:
        return restart(segments_BT)
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return index_BT if cache is None else cache.lengths_B[:, None] + index_BT


@shaped
def angles(positions_BT: jax.Array, head_width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, 1, T, H/2] of each channel pair's angle, linear in the position (arXiv:2104.09864)."""
    frequency = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions_BT.astype(jnp.float32)[:, None, :, None] * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


@shaped
def rotate(x_BNTH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each pair (channel i, channel i + H/2) by its angle, in float32."""
    cos, sin = angles
    a, b = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTH.dtype)
