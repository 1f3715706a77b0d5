"""Attention: who may look at whom is described by a `Mask`; one function computes it, over interchangeable backends.

    attend(q_BNTH, k_BKSH, v_BKSH, Mask(causal=True, segments_BT=segments_BT), backend="auto")

`xla` is the reference: B x N x T x S scores exist. `chunked` keeps memory linear in T. `splash` is the TPU's kernel,
`triton` the GPU's. Each honours every field of the mask that it accepts, and `auto` never picks one that does not.
Where the tokens of a row are split over devices, `ring` and `alltoall` say how (`nn.context`), or `auto` does.
Heads lie in front of tokens, and query heads that share a key/value head lie together, so every product is one batched
product over (B K).
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from jaxlm import axes, lookup
from jaxlm.axes import shaped
from jaxlm.nn import context, native, positions, splash, triton
from jaxlm.nn.cache import Cache
from jaxlm.nn.linear import crossed, dense, normal, zeros
from jaxlm.nn.mask import Mask, ahead, visible

Bias = Callable[[jax.Array], jax.Array]  # from how far a query is ahead of a key [B or 1, T, S] to scores [.., N, T, S]

HIDDEN = -1e30  # a score that is masked: finite, so that a row with nothing to see stays finite


def xla(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None,
    bias: Bias | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax(q k / sqrt(H)) v with the scores in memory (arXiv:1706.03762, eq. 1), but for blocks that nobody sees."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    spans = _spans(mask, T, S)
    if cap is not None or bias is not None or (T == 1 and axes.platform() != "cpu"):
        blocks = [
            _block(q_BNTH[:, :, first:last], k_BKSH[:, :, low:high], v_BKSH[:, :, low:high], mask, cap, bias,
                   jnp.arange(first, last), jnp.arange(low, high))
            for first, last, low, high in spans
        ]  # fmt: skip
        return jnp.concatenate(blocks, axis=2)
    hides = [
        jnp.where(visible(mask, jnp.arange(first, last), jnp.arange(low, high)), 0.0, HIDDEN)
        for first, last, low, high in spans
    ]
    return _attend_in_spans(q_BNTH, k_BKSH, v_BKSH, hides, spans)


def over_bits(
    q_BNTH: jax.Array, keys: jax.Array, values: jax.Array, mask: Mask, cap: float | None, bias: Bias | None
) -> jax.Array:
    """The same for a few queries over a CPU's cache, whose keys and values [B, K, S, H] are the bits of bfloat16s,
    whatever the backend (`nn.native`).
    """
    (B, N, T, H), (K, S) = q_BNTH.shape, keys.shape[1:3]
    slots = jnp.arange(T), jnp.arange(S)
    more = jnp.where(visible(mask, *slots), 0.0, HIDDEN)[:, None]
    if bias is not None:
        more = more + bias(ahead(mask, *slots))
    if more.shape[1:3] != (1, 1):
        more = jnp.broadcast_to(more, (len(more), N, T, S)).reshape(len(more), K, -1, S)
    q_BKRH = (q_BNTH.astype(jnp.float32) * H**-0.5).reshape(B, K, -1, H)
    return native.attend(q_BKRH, keys, values, more, cap).reshape(B, N, T, H)


def _block(q, k, v, mask: Mask, cap: float | None, bias: Bias | None, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Attention of the queries in these slots over the keys in those, to be differentiated by JAX."""
    B, N, t, H = q.shape
    K, rows = k.shape[1], t * N // k.shape[1]
    score = _scores((q * H**-0.5).reshape(B, K, rows, H), k).reshape(B, N, t, len(keys))
    if cap is not None:
        score = cap * jnp.tanh(score / cap)
    if bias is not None:
        score = score + bias(ahead(mask, queries, keys))
    score = score + jnp.where(visible(mask, queries, keys), 0.0, HIDDEN)[:, None]
    prob = jax.nn.softmax(score, axis=-1).reshape(B, K, rows, -1)
    return _mixed(prob, v).reshape(B, N, t, H)


def _scores(q_BKRH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    score = jnp.einsum("bkrh,bksh->bkrs", _several(q_BKRH), k_BKSH, preferred_element_type=jnp.float32)
    return score[:, :, : q_BKRH.shape[2]]


def _mixed(prob_BKRS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    out = jnp.einsum("bkrs,bksh->bkrh", _several(prob_BKRS.astype(v_BKSH.dtype)), v_BKSH)
    return out[:, :, : prob_BKRS.shape[2]]


def _several(x_BKTH: jax.Array) -> jax.Array:
    """The rows of x, and behind one that is alone zeros that make it 8, as a TPU has rows together: its compiler makes
    a slow sum of a product with one row.
    """
    alone = axes.platform() == "tpu" and x_BKTH.shape[2] == 1
    return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, 7), (0, 0))) if alone else x_BKTH


Spans = tuple[tuple[int, int, int, int], ...]


def _spans(mask: Mask, T: int, S: int) -> Spans:
    """Up to four blocks of at least 64 queries, each with the keys that its queries may see at all."""
    size = -(-T // max(1, min(4, T // 64)))
    spans = []
    for first in range(0, T, size):
        last, low, high = min(first + size, T), 0, S
        if mask.offset_B is None and mask.causal and mask.prefix_BT is None:
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
        place = (*[(0, 0)] * (d.ndim - 2), (low, k.shape[2] - high), (0, 0))
        dk += jnp.pad(crossed(d_score, _rows(q, k, first, last) * scale), place)
        dv += jnp.pad(crossed(power, d), place)
    dq = jnp.concatenate(dqs, axis=2)
    return dq, jnp.astype(dk, k.dtype).reshape(k.shape), jnp.astype(dv, v.dtype).reshape(v.shape), None


_attend_in_spans.defvjp(_attend_forward, _attend_backward)


def _rows(x: jax.Array, k: jax.Array, first: int, last: int) -> jax.Array:
    """Tokens first..last of [B, N, T, H] as one batch: [B K, G x tokens, H], heads that share keys together. Where
    devices have heads of their own [B, K, ..], since that one axis could not be split so.
    """
    B, K = k.shape[:2]
    lead = (B, K) if axes.splitting("K", "BKSH", k.shape) else (B * K,)
    return x[:, :, first:last].reshape(*lead, x.shape[1] // K * (last - first), x.shape[-1])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    left, right, out = spec.replace(",", "->").split("->")
    return jnp.einsum(f"...{left},...{right}->...{out}", a, b, preferred_element_type=jnp.float32)


def chunked(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, cap: float | None = None,
    bias: Bias | None = None, chunk: int = 256,
) -> jax.Array:  # fmt: skip
    """The same with memory linear in T: one block of queries at a time, computed again in the backward pass
    (arXiv:2112.05682), over the keys that its quarter of the queries may see at all.
    """
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    spans = _spans(mask, T, S)
    if all((low, high) == (0, S) for _, _, low, high in spans):
        spans = ((0, T, 0, S),)  # one loop for all is less to compile
    outs = [_in_blocks(q_BNTH, k_BKSH, v_BKSH, mask, cap, bias, chunk, *span) for span in spans]
    return jnp.concatenate(outs, axis=2)


def _in_blocks(q, k, v, mask: Mask, cap: float | None, bias: Bias | None, chunk: int, first, last, low, high):
    """Attention of queries first..last over keys low..high, `chunk` queries at a time."""
    q, k, v = q[:, :, first:last], k[:, :, low:high], v[:, :, low:high]
    B, N, T, H = q.shape
    chunk = min(chunk, T)
    blocks = -(-T // chunk)

    @jax.checkpoint
    def block(_, xs):
        q_BNtH, start = xs
        at = jnp.minimum(start + jnp.arange(chunk), last - 1)  # padded queries repeat the last one, and are cut off
        return None, _block(q_BNtH, k, v, mask, cap, bias, at, jnp.arange(low, high))

    q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * chunk - T), (0, 0)))
    q = q.reshape(B, N, blocks, chunk, H).transpose(2, 0, 1, 3, 4)
    out = jax.lax.scan(block, None, (q, first + jnp.arange(blocks) * chunk))[1]
    return out.transpose(1, 2, 0, 3, 4).reshape(B, N, blocks * chunk, H)[:, :, :T]


KERNELS = {"splash": splash, "triton": triton}  # each for one kind of device; on others they run interpreted, for tests
BACKENDS: dict[str, Callable] = {"xla": xla, "chunked": chunked, **{name: k.attend for name, k in KERNELS.items()}}


def choose(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask, cap: float | None = None, biased: bool = False
) -> str:  # fmt: skip
    """What `auto` means here: the device's kernel where there is one that applies, else `xla` up to 1,024 keys (or one
    query), else `chunked`.
    """
    for name, kernel in KERNELS.items():
        if axes.platform() == kernel.PLATFORM and kernel.refuses(q_shape, k_shape, mask, cap, biased) is None:
            return name
    return "xla" if k_shape[2] <= 1024 or q_shape[2] == 1 else "chunked"


@shaped
def attend(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, backend: str = "auto",
    cap: float | None = None, bias: Bias | None = None,
) -> jax.Array:  # fmt: skip
    """Attention of N query heads over K key/value heads, softmax in float32: [B, N, T, H] in v's dtype.

    `cap` bends scores to cap tanh(score / cap); `bias` adds to them by distance. Raises `Mistake` for an unknown
    backend, or one that cannot honour the mask, the shape or what is done to the scores.
    """
    asked = q_BNTH.shape, k_BKSH.shape, mask, cap, bias is not None
    if backend in ("auto", *context.WAYS):
        if context.split(q_BNTH.shape, k_BKSH.shape, mask):
            return context.attend(q_BNTH, k_BKSH, v_BKSH, mask, backend, cap, bias, attend)
        backend = choose(*asked)
    compute = lookup.key("config.model.attention", backend, BACKENDS | dict.fromkeys(("auto", *context.WAYS)))
    if backend not in KERNELS:
        return compute(q_BNTH, k_BKSH, v_BKSH, mask, cap, bias)
    if reason := KERNELS[backend].refuses(*asked):
        raise lookup.Mistake(f"attention backend {backend!r}: {reason}; choose 'xla' or 'chunked'")
    return compute(q_BNTH, k_BKSH, v_BKSH, mask, cap)


def _padded(prefix_BT: jax.Array | None, slots: int) -> jax.Array | None:
    """For a cache that begins with these tokens, as a prefix does: the slots behind them are not of it."""
    return None if prefix_BT is None else jnp.pad(prefix_BT, ((0, 0), (0, slots - prefix_BT.shape[1])))


class Attention(nnx.Module):
    """Projections around `attend`: grouped queries (arXiv:2305.13245), optionally rotary positions, biases (of the
    output too, unless `out_bias` says otherwise), norms of queries and keys, and scores scaled otherwise than by
    H ** -0.5, capped or biased.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, *, bias: bool = False,
        out_bias: bool | None = None, qk_norm: Callable[[int], nnx.Module] | None = None, scale: float | None = None,
        cap: float | None = None, backend: str = "auto", std: float, out_std: float, q_std: float | None = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if heads % kv_heads:
            raise lookup.Mistake(f"config.model: heads={heads} is no multiple of kv_heads={kv_heads}")
        self.wq_DNH = normal(rngs, width, heads, head_width, std=q_std or std)
        self.wk_DKH = normal(rngs, width, kv_heads, head_width, std=std)
        self.wv_DKH = normal(rngs, width, kv_heads, head_width, std=std)
        self.wo_NHD = normal(rngs, heads, head_width, width, std=out_std)
        self.bias_q_NH = zeros(heads, head_width) if bias else None
        self.bias_k_KH = zeros(kv_heads, head_width) if bias else None
        self.bias_v_KH = zeros(kv_heads, head_width) if bias else None
        self.bias_D = zeros(width) if (bias if out_bias is None else out_bias) else None
        self.q_norm = qk_norm and qk_norm(head_width)
        self.k_norm = qk_norm and qk_norm(head_width)
        self.rescale = None if scale is None else scale * head_width**0.5  # `attend` itself divides by sqrt(H)
        self.heads, self.cap, self.backend = heads, cap, backend

    @shaped
    def __call__(
        self, x_BTD: jax.Array, mask: Mask, angles: tuple[jax.Array, jax.Array] | None = None,
        cache: Cache | None = None, layer: jax.Array | None = None, bias: Bias | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """Attend among x, or over the cache of `layer` after writing x's keys and values to it; over an empty one, that
        is among x, by any backend.
        """
        q_BNTH = self._queries(x_BTD)
        k_BKTH, v_BKTH = self.keys_values(x_BTD)
        if angles is not None:
            q_BNTH, k_BKTH = positions.rotate(q_BNTH, angles), positions.rotate(k_BKTH, angles)
        k_BKSH, v_BKSH = (axes.constrain(x, "BKTH", N=q_BNTH.shape[1]) for x in (k_BKTH, v_BKTH))
        if cache is not None and layer is not None and cache.fresh:
            cache = cache.write(layer, k_BKTH, v_BKTH)
        elif cache is not None and layer is not None:
            cache, k_BKSH, v_BKSH = cache.extend(layer, k_BKTH, v_BKTH)
            mask = dataclasses.replace(mask, offset_B=cache.lengths_B, prefix_BT=_padded(mask.prefix_BT, cache.slots))
        return self._out(x_BTD, q_BNTH, k_BKSH, v_BKSH, mask, bias), cache

    @shaped
    def over(self, x_BTD: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        """Attend over the `keys_values` of other tokens: an encoder's, with a row for each B or for several.

        Rows that read the same lie together, and are read as one long row, so that no key is copied for them.
        """
        together = lambda x: x.reshape(len(k), -1, *x.shape[2:])  # noqa: E731
        rows = together(x_BTD)
        if mask.segments_BT is not None:
            mask = dataclasses.replace(mask, segments_BT=together(mask.segments_BT))
        return self._out(rows, self._queries(rows), k, v, mask, None).reshape(x_BTD.shape)

    @shaped
    def keys_values(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, T, H] of these tokens."""
        x_BTD = self._gathered(x_BTD)
        k_BKTH = dense(x_BTD, self.wk_DKH, self.bias_k_KH).transpose(0, 2, 1, 3)
        v_BKTH = dense(x_BTD, self.wv_DKH, self.bias_v_KH).transpose(0, 2, 1, 3)
        return (k_BKTH if self.k_norm is None else self.k_norm(k_BKTH)), v_BKTH

    def _gathered(self, x_BTD: jax.Array) -> jax.Array:
        return axes.constrain(x_BTD, "BTD", N=self.heads)

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        q_BNTH = dense(self._gathered(x_BTD), self.wq_DNH, self.bias_q_NH).transpose(0, 2, 1, 3)
        if self.q_norm is not None:
            q_BNTH = self.q_norm(q_BNTH)
        return q_BNTH if self.rescale is None else q_BNTH * self.rescale

    def _out(self, x_BTD, q_BNTH, k_BKSH, v_BKSH, mask: Mask, bias: Bias | None) -> jax.Array:
        q_BNTH = axes.constrain(q_BNTH, "BNTH")
        if v_BKSH.dtype == jnp.uint16:
            out_BNTH = over_bits(q_BNTH, k_BKSH, v_BKSH, mask, self.cap, bias)
        else:
            out_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, mask, self.backend, self.cap, bias)
        y_BTD = dense(out_BNTH.transpose(0, 2, 1, 3).astype(x_BTD.dtype), self.wo_NHD, self.bias_D, over=2)
        return axes.summed(y_BTD, "BTD", N=self.heads)
