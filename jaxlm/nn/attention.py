"""Attention: who may look at whom is described by a `Mask`; one function computes it, over interchangeable backends.

    attend(q_BNTH, k_BKSH, v_BKSH, Mask(causal=True, segments_BT=segments_BT), backend="auto")

`xla` is the reference: B x N x T x S scores exist. `chunked` keeps memory linear in T. `splash` is the TPU kernel. Each
honours every field of the mask that it accepts, and `auto` never picks one that does not. Heads lie in front of tokens,
and query heads that share a key/value head lie together, so every product is one batched product over (B K).
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, lookup
from jaxlm.axes import shaped
from jaxlm.nn import positions, splash
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import dense, normal, zeros
from jaxlm.nn.mask import Mask, visible

HIDDEN = -1e30  # a score that is masked: finite, so that a row with nothing to see stays finite


def xla(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> jax.Array:
    """Softmax(q k / sqrt(H)) v with the scores in memory (arXiv:1706.03762, eq. 1), but for blocks that nobody sees."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    spans = _spans(mask, T, S)
    hides = [
        jnp.where(visible(mask, jnp.arange(first, last), jnp.arange(low, high)), 0.0, HIDDEN)
        for first, last, low, high in spans
    ]
    return _attend_in_spans(q_BNTH, k_BKSH, v_BKSH, hides, spans)


Spans = tuple[tuple[int, int, int, int], ...]


def _spans(mask: Mask, T: int, S: int) -> Spans:
    """Up to four blocks of at least 64 queries, each with the keys that its queries may see at all."""
    size = -(-T // max(1, min(4, T // 64)))
    spans = []
    for first in range(0, T, size):
        last, low, high = min(first + size, T), 0, S
        if mask.offset_B is None and mask.causal:
            high = min(last, S)
            low = max(0, first - mask.window + 1) if mask.window else 0
        spans.append((first, last, low, high))
    return tuple(spans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_in_spans(q: jax.Array, k: jax.Array, v: jax.Array, hides: list[jax.Array], spans: Spans) -> jax.Array:
    return _attend_forward(q, k, v, hides, spans)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, hides: list[jax.Array], spans: Spans):
    outs, kept = [], []
    for (first, last, low, high), hide in zip(spans, hides):
        score = _product("th,sh->ts", _rows(q, k, first, last) * q.shape[-1] ** -0.5, _rows(k, k, low, high))
        score = (score.reshape(*q.shape[:2], *hide.shape[1:]) + hide[:, None]).reshape(score.shape)
        power = jnp.exp(score - score.max(-1, keepdims=True))
        total = power.sum(-1, keepdims=True)
        power = power.astype(v.dtype)
        out = _product("ts,sh->th", power, _rows(v, v, low, high)) / total
        outs.append(out.astype(v.dtype).reshape(*q.shape[:2], last - first, -1))
        kept.append((power, total))
    out = jnp.concatenate(outs, axis=2)
    return out, (q, k, v, out, kept)


def _attend_backward(spans: Spans, saved, d_out: jax.Array):
    """With P = E / total, and o = P v: dP = do v', dS = P (dP - do . o), dq = dS k, dk = dS' q, dv = P' do."""
    q, k, v, out, kept = saved
    scale, dqs, dk, dv = q.shape[-1] ** -0.5, [], 0.0, 0.0
    for (first, last, low, high), (power, total) in zip(spans, kept):
        d = _rows(d_out, v, first, last) / total
        inner = (d * _rows(out, v, first, last)).sum(-1, keepdims=True)
        d = d.astype(v.dtype)
        d_score = (power * (_product("th,sh->ts", d, _rows(v, v, low, high)) - inner)).astype(v.dtype)
        dq = _product("ts,sh->th", d_score, _rows(k, k, low, high)) * scale
        dqs.append(dq.astype(q.dtype).reshape(*q.shape[:2], last - first, -1))
        place = ((0, 0), (low, k.shape[2] - high), (0, 0))
        dk += jnp.pad(_product("ts,th->sh", d_score, _rows(q, k, first, last) * scale), place)
        dv += jnp.pad(_product("ts,th->sh", power, d), place)
    dq = jnp.concatenate(dqs, axis=2)
    return dq, jnp.astype(dk, k.dtype).reshape(k.shape), jnp.astype(dv, v.dtype).reshape(v.shape), None


_attend_in_spans.defvjp(_attend_forward, _attend_backward)


def _rows(x: jax.Array, k: jax.Array, first: int, last: int) -> jax.Array:
    """Tokens first..last of [B, N, T, H] as one batch: [B K, G x tokens, H], heads that share keys together."""
    B, K = k.shape[:2]
    return x[:, :, first:last].reshape(B * K, x.shape[1] // K * (last - first), x.shape[-1])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    left, right, out = spec.replace(",", "->").split("->")
    return jnp.einsum(f"b{left},b{right}->b{out}", a, b, preferred_element_type=jnp.float32)


def chunked(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, chunk: int = 256) -> jax.Array:
    """The same with memory linear in T: one block of queries at a time, computed again in the backward pass
    (arXiv:2112.05682).
    """
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    chunk = min(chunk, T)
    blocks = -(-T // chunk)
    q = jnp.pad(q_BNTH, ((0, 0), (0, 0), (0, blocks * chunk - T), (0, 0)))

    @jax.checkpoint
    def block(_, xs):
        q_BNtH, start = xs
        at = jnp.minimum(start + jnp.arange(chunk), T - 1)  # padded queries repeat the last one, and are cut off below
        hide = jnp.where(visible(mask, at, jnp.arange(S)), 0.0, HIDDEN)
        q = (q_BNtH * H**-0.5).reshape(B, K, N // K * chunk, H)
        score = jnp.einsum("bkth,bksh->bkts", q, k_BKSH, preferred_element_type=jnp.float32)
        score = (score.reshape(B, N, chunk, S) + hide[:, None]).reshape(B, K, -1, S)
        prob = jax.nn.softmax(score, axis=-1).astype(v_BKSH.dtype)
        return None, jnp.einsum("bkts,bksh->bkth", prob, v_BKSH).reshape(B, N, chunk, H)

    q = q.reshape(B, N, blocks, chunk, H).transpose(2, 0, 1, 3, 4)
    out = jax.lax.scan(block, None, (q, jnp.arange(blocks) * chunk))[1]
    return out.transpose(1, 2, 0, 3, 4).reshape(B, N, blocks * chunk, H)[:, :, :T]


BACKENDS: dict[str, Callable] = {"xla": xla, "chunked": chunked, "splash": splash.attend}


def choose(q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask) -> str:
    """What `auto` means here: the TPU kernel where it applies, else `xla` up to 1,024 keys (or one query), else
    `chunked`.
    """
    if axes.platform() == "tpu" and splash.refuses(q_shape, k_shape, mask) is None:
        return "splash"
    return "xla" if k_shape[2] <= 1024 or q_shape[2] == 1 else "chunked"


@shaped
def attend(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, backend: str = "auto") -> jax.Array:
    """Attention of N query heads over K key/value heads, softmax in float32: [B, N, T, H] in v's dtype.

    Raises `Mistake` for an unknown backend, or one that cannot honour the mask or the shape.
    """
    if backend == "auto":
        backend = choose(q_BNTH.shape, k_BKSH.shape, mask)
    return lookup.key("config.model.attention", backend, BACKENDS)(q_BNTH, k_BKSH, v_BKSH, mask)


class Attention(nnx.Module):
    """Projections around `attend`: grouped queries (arXiv:2305.13245), optionally rotary positions, biases (of the
    output too, unless `out_bias` says otherwise) and norms of queries and keys.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, *, bias: bool = False,
        out_bias: bool | None = None, qk_norm: Callable[[int], nnx.Module] | None = None, backend: str = "auto",
        std: float, out_std: float, rngs: nnx.Rngs,
    ):  # fmt: skip
        if heads % kv_heads:
            raise lookup.Mistake(f"config.model: heads={heads} is no multiple of kv_heads={kv_heads}")
        self.wq_DNH = normal(rngs, width, heads, head_width, std=std)
        self.wk_DKH = normal(rngs, width, kv_heads, head_width, std=std)
        self.wv_DKH = normal(rngs, width, kv_heads, head_width, std=std)
        self.wo_NHD = normal(rngs, heads, head_width, width, std=out_std)
        self.bias_q_NH = zeros(heads, head_width) if bias else None
        self.bias_k_KH = zeros(kv_heads, head_width) if bias else None
        self.bias_v_KH = zeros(kv_heads, head_width) if bias else None
        self.bias_D = zeros(width) if (bias if out_bias is None else out_bias) else None
        self.q_norm = qk_norm and qk_norm(head_width)
        self.k_norm = qk_norm and qk_norm(head_width)
        self.backend = backend

    @shaped
    def __call__(
        self, x_BTD: jax.Array, mask: Mask, angles: tuple[jax.Array, jax.Array] | None = None,
        cache: Cache | None = None, layer: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """Attend among x, or over the cache of `layer` after writing x's keys and values to it."""
        q_BNTH = dense(x_BTD, self.wq_DNH, self.bias_q_NH).transpose(0, 2, 1, 3)
        k_BKTH = dense(x_BTD, self.wk_DKH, self.bias_k_KH).transpose(0, 2, 1, 3)
        v_BKTH = dense(x_BTD, self.wv_DKH, self.bias_v_KH).transpose(0, 2, 1, 3)
        if self.q_norm is not None and self.k_norm is not None:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        if angles is not None:
            q_BNTH, k_BKTH = positions.rotate(q_BNTH, angles), positions.rotate(k_BKTH, angles)
        q_BNTH, k_BKSH, v_BKSH = (
            axes.constrain(q_BNTH, "BNTH"),
            axes.constrain(k_BKTH, "BKTH"),
            axes.constrain(v_BKTH, "BKTH"),
        )
        if cache is not None and layer is not None:
            cache = cache.write(layer, k_BKTH, v_BKTH)
            k_BKSH, v_BKSH = cache.read(layer)
            mask = dataclasses.replace(mask, offset_B=cache.lengths_B)
        out_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, mask, self.backend)
        return dense(out_BNTH.transpose(0, 2, 1, 3).astype(x_BTD.dtype), self.wo_NHD, self.bias_D, axes=2), cache
