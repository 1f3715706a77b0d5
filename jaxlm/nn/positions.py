"""Where a token stands: rotary embeddings, and positions that restart with every document.

restart(segments [1 1 1 2 2 0])  ->  [0 1 2 0 1 0]
"""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes, lookup
from jaxlm.axes import shaped
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import normal


@shaped
def restart(segments_BT: jax.Array) -> jax.Array:
    """Positions [B, T] that count from 0 within each run of equal segment numbers."""
    segments_BT = axes.constrain(segments_BT, "B_")  # each counts what is before it: devices have rows of ids whole
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    fresh_BT = jnp.concatenate([jnp.ones_like(segments_BT[:, :1]), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    return axes.constrain(index_BT - jax.lax.cummax(jnp.where(fresh_BT > 0, index_BT, 0), axis=1), "B_")


def of(tokens_BT: jax.Array, segments_BT: jax.Array | None = None, cache: Cache | None = None) -> jax.Array:
    """Positions [B, T] of tokens: behind what the cache holds, or restarting with each segment, or from 0."""
    if segments_BT is not None:
        return restart(segments_BT)
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return index_BT if cache is None else cache.lengths_B[:, None] + index_BT


class RelativeBias(nnx.Module):
    """What a head adds to the score of a key by its distance, in buckets that widen (arXiv:1910.10683, section 2.1).

    Half the buckets are for single distances, the others grow up to `furthest`; bidirectional, each side has half.
    Drawn as wide as Glorot's (AISTATS 2010, eq. 12), the default in the paper's code.
    """

    def __init__(self, buckets: int, heads: int, furthest: int, *, causal: bool, rngs: nnx.Rngs):
        self.table_CN = normal(rngs, buckets, heads, std=(2 / (buckets + heads)) ** 0.5)
        self.buckets, self.furthest, self.causal = buckets, furthest, causal

    def __call__(self, ahead: jax.Array) -> jax.Array:
        """Scores [B or 1, N, T, S] for queries that are so far ahead of keys [B or 1, T, S]."""
        buckets = self.buckets if self.causal else self.buckets // 2
        side = 0 if self.causal else jnp.where(ahead < 0, buckets, 0)
        far = jnp.maximum(ahead, 0) if self.causal else jnp.abs(ahead)
        exact = buckets // 2
        grown = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(self.furthest / exact)
        wide = jnp.minimum(exact + (grown * (buckets - exact)).astype(jnp.int32), buckets - 1)
        bucket = side + jnp.where(far < exact, far, wide)
        table_CN = self.table_CN[...]
        bucket = axes.constrain(bucket, "_TS", N=table_CN.shape[1])  # tensor splits heads, so not the queries
        bias = table_CN.at[bucket].get(mode="promise_in_bounds")
        return jnp.moveaxis(axes.constrain(bias, "_TSN"), -1, 1)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How rotary frequencies are changed for rows longer than those of pretraining: `config.model.rope_scaling`.

    linear: all divided by `factor` (arXiv:2306.15595). llama3: those whose wave is longer than original / low_freq;
    between that and original / high_freq, in between (arXiv:2407.21783). yarn: those that turn less than beta_slow
    times in `original` tokens; up to beta_fast turns, in between; and scores sharpened (arXiv:2309.00071, section 3.4).
    """

    kind: str
    factor: float
    original: int = 0  # tokens of a row in pretraining
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float | None = None  # yarn: what cosine and sine are multiplied by; 0.1 ln(factor) + 1 unless given

    def __post_init__(self):
        lookup.key("config.model.rope_scaling.kind", self.kind, dict.fromkeys(("linear", "llama3", "yarn")))
        if self.kind != "linear" and self.original < 1:
            raise lookup.Mistake(f"config.model.rope_scaling: {self.kind} needs `original`, the context of pretraining")

    @classmethod
    def of(cls, section: Any) -> "Scaling | None":
        """From `config.model.rope_scaling`: nothing, one of these, or a section of a config."""
        if section is None or isinstance(section, Scaling):
            return section
        if not hasattr(section, "keys"):  # ConfigDict is no Mapping
            raise lookup.Mistake(f"config.model.rope_scaling is a section with kind and factor, not {section!r}")
        return lookup.spend("config.model.rope_scaling", cls, section)

    def __call__(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """The changed frequencies (radians a token) [H / 2]."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original * frequency / (2 * np.pi)  # of each channel pair in a row of pretraining
        if self.kind == "llama3":
            keep = np.clip((turns - self.low_freq) / (self.high_freq - self.low_freq), 0, 1)
        else:
            n = len(frequency)
            channel = lambda turns: n * math.log(self.original / (turns * 2 * math.pi)) / math.log(base)  # noqa: E731
            low, high = math.floor(channel(self.beta_fast)), math.ceil(channel(self.beta_slow))
            low, high = max(low, 0), min(high, 2 * n - 1)
            keep = 1 - np.clip((np.arange(n) - low) / max(high - low, 1e-3), 0, 1)
        return frequency * keep + frequency / self.factor * (1 - keep)

    @property
    def sharpness(self) -> float:
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention


@shaped
def angles(
    positions_BT: jax.Array, head_width: int, base: float, scaling: Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, 1, T, H/2] of each channel pair's angle, linear in the position (arXiv:2104.09864)."""
    if head_width % 2:
        raise lookup.Mistake(f"config.model.head_width={head_width} is odd, and rotary positions turn pairs")
    frequency = base ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    sharpness = 1.0 if scaling is None else scaling.sharpness
    if scaling is not None:
        frequency = scaling(frequency, base)
    angle = positions_BT.astype(jnp.float32)[:, None, :, None] * frequency.astype(np.float32)[None, None, None]
    return jnp.cos(angle) * sharpness, jnp.sin(angle) * sharpness


@shaped
def rotate(x_BNTH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each pair (channel i, channel i + H/2) by its angle, in float32."""
    cos, sin = angles
    a, b = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTH.dtype)
