"""Keys and values seen so far, or a recurrent layer's states, for decoding one token at a time.

Row b holds its tokens in slots 0 .. lengths[b]-1, whatever the other rows do; the next token goes to slot lengths[b].
What lies beyond is stale and out of sight of a causal mask, so prompts are padded on the right and nothing marks the
padding.

    k_LBKSH   one array, for layers that are scanned; after `unstacked` a tuple of L arrays [B K, S, H], for layers that
              stand in a row: a layer is then read where it lies, while a scan copies it out. On a CPU whose own
              kernel reads them (`nn.native`), bfloat16s are held in half the memory then

In a stack, a single token of each row waits in k_LBKH until all layers have read it, and is then put behind the rows of
all layers at once: layers only read k_LBKSH, which a TPU lays out as their products like it, and no write turns it.

A recurrent layer keeps its state after every token, though it reads the last one alone: a row is then set back to a
token by its length, as all rows are.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import axes
from jaxlm.axes import shaped
from jaxlm.nn import native

Layers = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' keys and values, heads in front of slots, and how many slots of each row are taken."""

    k_LBKSH: Layers
    v_LBKSH: Layers | None  # None for layers that keep one thing a token
    lengths_B: jax.Array
    # An encoder's keys and values [L, inputs, K, S, H], read by all tokens, and which of its tokens are no padding
    # [inputs, S]. Rows that read the same input lie together, each input has as many. Held as bits they are L arrays.
    cross: tuple[Layers, Layers] | None = None
    real: jax.Array | None = None
    k_LBKH: jax.Array | None = None  # of the token that the layers of a stack are reading; None where there is no stack
    v_LBKH: jax.Array | None = None
    # Whether a program that is traced may count on all rows being empty: new tokens then look at each other alone.
    fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))
    # Whether a CPU's keys and values become bfloat16s, as `nn.native` reads them, once layers stand in a row.
    halved: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @classmethod
    def empty(
        cls, layers: int, batch: int, kv_heads: int, slots: int, head_width: int, dtype: jnp.dtype,
        values: bool = True,
    ) -> "Cache":  # fmt: skip
        """Room for `slots` tokens in each row, none taken; on a mesh, split by rows and heads. On a CPU in float32
        while layers are stacked: it would turn the whole of it into that and back for each layer that writes.
        """
        cpu = axes.platform() == "cpu"
        halved = cpu and axes.alone() and values and dtype == jnp.bfloat16 and native.ready()
        dtype = jnp.dtype("float32") if cpu else dtype
        sizes = dict(L=layers, B=batch, K=kv_heads, S=slots, H=head_width)
        empty = lambda letters: axes.constrain(jnp.zeros([sizes[x] for x in letters], dtype), letters)  # noqa: E731
        k_LBKSH, v_LBKSH = empty("LBKSH"), empty("LBKSH") if values else None
        k_LBKH, v_LBKH = empty("LBKH"), empty("LBKH") if values else None
        lengths_B = jnp.zeros(batch, jnp.int32)
        return cls(k_LBKSH, v_LBKSH, lengths_B, k_LBKH=k_LBKH, v_LBKH=v_LBKH, fresh=True, halved=halved)

    @shaped
    def remember(self, blocks: Any, memory_BSD: jax.Array, real_BS: jax.Array) -> "Cache":
        """The same with the keys and values of an encoder's states for each of the decoder's stacked blocks, which read
        them by their part `cross`; `real_BS` is 0 for padding.
        """
        graph, params = nnx.split(blocks)
        cross = jax.vmap(lambda params: nnx.merge(graph, params).cross.keys_values(memory_BSD))(params)
        return dataclasses.replace(self, cross=cross, real=real_BS)

    @property
    def slots(self) -> int:
        """How many tokens a row has room for."""
        return jax.tree.leaves(self.k_LBKSH)[0].shape[-2]

    @shaped
    def write(self, layer: jax.Array | int, k_BKTH: jax.Array, v_BKTH: jax.Array | None) -> "Cache":
        """Put T new tokens of one layer behind what each row holds; `grow` then counts them, once all layers have
        written.
        """
        B, K, T, H = k_BKTH.shape

        def keep(old_LBKH, new_BKTH):
            new_BKH = new_BKTH[:, :, 0].astype(old_LBKH.dtype)
            return jax.lax.dynamic_update_index_in_dim(old_LBKH, new_BKH, layer, 0)

        def put(old, new_BKTH):
            if not isinstance(old, tuple):
                return _behind(old, new_BKTH[None], layer, self.lengths_B)
            row, slot_BT = jnp.arange(B * K)[:, None], self.lengths_B[:, None] + jnp.arange(T)[None]
            new = native.bits(new_BKTH) if self.halved else new_BKTH.astype(old[layer].dtype)
            place = old[layer].at[row, jnp.repeat(slot_BT, K, axis=0)]
            x = place.set(new.reshape(B * K, T, H), mode="drop")
            return (*old[:layer], x, *old[layer + 1 :])

        if T == 1 and self.k_LBKH is not None:
            k_LBKH, v_LBKH = _each(keep, (self.k_LBKH, k_BKTH), (self.v_LBKH, v_BKTH))
            return dataclasses.replace(self, k_LBKH=k_LBKH, v_LBKH=v_LBKH)
        return self._with(_each(put, (self.k_LBKSH, k_BKTH), (self.v_LBKSH, v_BKTH)))

    @shaped
    def extend(
        self, layer: jax.Array | int, k_BKTH: jax.Array, v_BKTH: jax.Array | None
    ) -> tuple["Cache", jax.Array, Any]:
        """`write`, and that layer's keys and values [B, K, S, H] with the new ones behind the others, or the bits of
        them.
        """
        cache = self.write(layer, k_BKTH, v_BKTH)
        k_BKSH, v_BKSH = cache.read(layer)
        if k_BKTH.shape[2] == 1 and self.k_LBKH is not None:
            here = (jnp.arange(self.slots)[None] == self.lengths_B[:, None])[:, None, :, None]
            put = lambda x_BKSH, new_BKTH: jnp.where(here, new_BKTH.astype(x_BKSH.dtype), x_BKSH)  # noqa: E731
            k_BKSH, v_BKSH = _each(put, (k_BKSH, k_BKTH), (v_BKSH, v_BKTH))
        return cache, k_BKSH, v_BKSH

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, Any]:
        """One layer's keys and values [B, K, S, H], or the bits of them."""
        shape = (len(self.lengths_B), -1)
        return _each(lambda x: x[layer].reshape(*shape, *x[layer].shape[-2:]), (self.k_LBKSH,), (self.v_LBKSH,))

    def last(self, layer: jax.Array | int) -> tuple[jax.Array, Any]:
        """What one layer keeps of each row's last token [B, K, H]; zeros where a row is empty."""
        row_B, slot_B = jnp.arange(len(self.lengths_B)), jnp.maximum(self.lengths_B - 1, 0)

        def pick(x):
            if isinstance(x, tuple):
                x_BKSH = x[layer].reshape(len(row_B), -1, *x[layer].shape[1:])
                x_BKH = x_BKSH[row_B, :, slot_B]
            else:
                x_BKH = x[layer, row_B, :, slot_B]
            return jnp.where((self.lengths_B > 0)[:, None, None], x_BKH, 0)

        return _each(pick, (self.k_LBKSH,), (self.v_LBKSH,))

    def grow(self, tokens: int) -> "Cache":
        """Count the `tokens` that all layers have written as taken slots of each row, which is to have room for them; a
        single token is put there now.
        """
        cache = self
        if tokens == 1 and self.k_LBKH is not None:
            put = lambda old, new_LBKH: _behind(old, new_LBKH[:, :, :, None], 0, self.lengths_B)  # noqa: E731
            cache = self._with(_each(put, (self.k_LBKSH, self.k_LBKH), (self.v_LBKSH, self.v_LBKH)))
        return dataclasses.replace(cache, lengths_B=self.lengths_B + tokens, fresh=False)

    def rows(self, index_B: jax.Array) -> "Cache":
        """The rows of the given numbers, which may repeat. What they read of an encoder stays: each input is to have as
        many of the new rows as any other, in the old order.
        """
        B = len(self.lengths_B)

        def pick(x):
            if x.ndim > 3:
                return jnp.take(x, index_B, axis=1)
            return jnp.take(x.reshape(B, -1, *x.shape[1:]), index_B, axis=0).reshape(-1, *x.shape[1:])

        names = ("k_LBKSH", "v_LBKSH", "k_LBKH", "v_LBKH")
        picked = {name: jax.tree.map(pick, getattr(self, name)) for name in names}
        return dataclasses.replace(self, **picked, lengths_B=self.lengths_B[index_B])

    def unstacked(self) -> "Cache":
        """The same with every layer's keys and values in an array of its own."""

        def split(x_LBKSH):
            layers = tuple(x_BKSH.reshape(-1, *x_BKSH.shape[2:]) for x_BKSH in x_LBKSH)
            return tuple(native.bits(x) for x in layers) if self.halved else layers

        cache = self._with(_each(split, (self.k_LBKSH,), (self.v_LBKSH,)))
        cross = self.cross
        if self.halved and cross is not None:
            cross = tuple(native.bits(x) for x in cross[0]), tuple(native.bits(x) for x in cross[1])
        return dataclasses.replace(cache, k_LBKH=None, v_LBKH=None, cross=cross)

    def _with(self, both: tuple[Any, Any]) -> "Cache":
        return dataclasses.replace(self, k_LBKSH=both[0], v_LBKSH=both[1])


def _each(fn: Callable, *calls: tuple) -> tuple[Any, Any]:
    """`fn` for the keys and for the values; None for values that are none."""
    keys, values = (None if x is None else fn(x, *more) for x, *more in calls)
    return keys, values


def _behind(old_LBKSH: jax.Array, new_LBKTH: jax.Array, layer: jax.Array | int, at_B: jax.Array) -> jax.Array:
    """Put T new tokens of each row, of one layer or of all, into its slots from `at_B` on: on the device that has the
    row, one copy a row.
    """

    def put(old, new, layer, at_B):
        for b in range(len(at_B)):
            old = jax.lax.dynamic_update_slice(old, new[:, b : b + 1], (layer, b, 0, at_B[b], 0))
        return old

    rows = axes.splitting("B", "LBKSH", old_LBKSH.shape)
    if rows:
        of, one = PartitionSpec(None, rows), PartitionSpec(rows)
        put = jax.shard_map(put, in_specs=(of, of, PartitionSpec(), one), out_specs=of, axis_names={*rows})
    return put(old_LBKSH, new_LBKTH.astype(old_LBKSH.dtype), jnp.asarray(layer), at_B)
