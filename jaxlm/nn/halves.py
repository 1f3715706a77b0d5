"""Products of a few queries with a cache in bfloat16, as a CPU reads it fast.

    keys, values = hold(k_BKSH, turned=True), hold(v_BKSH)      [B, K, H, S] and [B, K, S, H]: the bits of bfloat16s
    product(q_BKRH, keys)                                       [B, K, R, S]
    product(share_BKRS, values)                                 [B, K, R, H]

XLA's own product of a single row widens all of a bfloat16 array before it reads it. Written out, 8 products at a time
along the *result's* last axis, the cache is read once and as it lies; two rows and more are a product that XLA is fast
at. Bits, since it would also widen all of an array of bfloat16s to write one token to it.
"""

import jax
import jax.numpy as jnp

AT_ONCE = 8  # with more the loop is no longer one of vector instructions


def fits(slots: int, head_width: int) -> bool:
    """Whether keys and values of so many tokens and channels can be held so."""
    return slots % AT_ONCE == 0 and head_width % AT_ONCE == 0


def is_held(x: jax.Array) -> bool:
    """Whether x is what `hold` made."""
    return x.dtype == jnp.uint16


def hold(x: jax.Array, *, turned: bool = False) -> jax.Array:
    """[.., S, H] in any dtype -> the bits of its bfloat16s, [.., H, S] if `turned`."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return bits.swapaxes(-1, -2) if turned else bits


def product(a: jax.Array, bits: jax.Array) -> jax.Array:
    """[B, K, R, M], bits [B, K, M, N] -> [B, K, R, N] in float32; of several rows, `a` is rounded to bfloat16."""
    (B, K, R, M), N = a.shape, bits.shape[-1]
    a, b = a.reshape(B * K, R, M), jax.lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(B * K, M, N)
    if R > 1:
        y = jnp.einsum("xrm,xmn->xrn", a.astype(jnp.bfloat16), b, preferred_element_type=jnp.float32)
        return y.reshape(B, K, R, N)
    groups = M // AT_ONCE
    a, b = a.astype(jnp.float32).reshape(-1, groups, AT_ONCE, 1), b.reshape(-1, groups, AT_ONCE, N)
    sums = jnp.zeros((B * K, groups, N))
    for i in range(AT_ONCE):
        sums += a[:, :, i] * b[:, :, i].astype(jnp.float32)
    return (jnp.ones((B * K, 1, groups)) @ sums).reshape(B, K, 1, N)  # a product, or it would be one slow loop
