"""Arrays of checkpoints in chunks: what is on its way to the files or back is bounded, however large an array is.

    trees = handler()                                                       for ocp.args.PyTreeSave and PyTreeRestore
    ocp.args.PyTreeSave(tree, save_args=jax.tree.map(cut, tree))

Orbax alone writes what a device holds of an array as one chunk, and reads it whole into the host's memory before it
goes to the device. Here each chunk is a file of about `CHUNK` bytes, not compressed: numbers of trained weights hardly
get smaller, and compressing takes the cores from the next steps. A large array begins as zeros on its devices and is
filled chunk by chunk, each read once for all devices of the host.
"""

import collections
import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.arrays import subchunking
from orbax.checkpoint._src.serialization import limits, serialization
import tensorstore as ts

CHUNK, CHUNKS = 2**24, 1024  # bytes of a chunk: more where an array would be more chunks than this
ROW = 2**20  # bytes of x[0], such as a layer, from which on no chunk is of several
AHEAD, SHARE = 2**25, 16  # bytes that are under way at a time, or this share of what a host writes, or of an array read


def cut(x: jax.Array | jax.ShapeDtypeStruct) -> ocp.SaveArgs:
    """How an array is cut into chunks. Orbax makes them of equal size; where the lengths of the array have few
    divisors, larger ones are allowed until they are not tiny.
    """
    part = x.sharding.shard_shape(x.shape)
    whole, held, row = (math.prod(lengths) * x.dtype.itemsize for lengths in (x.shape, part, part[1:]))
    axes, size = (0,) if whole > CHUNK and row >= ROW else (), max(CHUNK, whole // CHUNKS)
    while size < held:
        chunk = subchunking.choose_chunk_shape(x.shape, part, x.dtype, size, shard_axes=axes)
        if 8 * math.prod(chunk) * x.dtype.itemsize >= size:
            break
        size *= 2
    return ocp.SaveArgs(chunk_byte_size=size, shard_axes=axes)


def handler() -> ocp.PyTreeCheckpointHandler:
    """What writes trees of arrays, and reads them, those that other handlers of Orbax wrote, too."""
    serialization.async_serialize_from_host = _write  # Orbax has no option for it
    kind = Arrays(min_slice_bytes_for_replica_parallel=CHUNK)
    ahead: Any = AHEAD / 10**9  # of GB, which need not be whole though Orbax's annotation says int
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, restore_concurrent_gb=ahead,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, kind)),
    )  # fmt: skip


class Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of arrays, with bounds."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        """Write arrays, a share of all at a time and by few threads, since the next steps run meanwhile."""
        held = sum(shard.data.nbytes for x in values for shard in x.addressable_shards)
        bounds = dict(
            byte_limiter=limits.LimitInFlightBytes(max(AHEAD, held // SHARE) + 1),
            ts_context=ocp.type_handlers.get_ts_context(
                use_ocdbt=False, file_io_concurrency_limit=4, data_copy_concurrency_limit=1
            ),
        )
        return await super().serialize(values, [info.replace(**bounds) for info in infos], args)

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        """Read arrays: the small ones side by side, then the large ones in turn."""
        small = [i for i, arg in enumerate(args) if math.prod(arg.global_shape or ()) * arg.dtype.itemsize <= CHUNK]
        read = await super().deserialize([infos[i] for i in small], [args[i] for i in small]) if small else []
        found = dict(zip(small, read, strict=True))
        return [found[i] if i in found else await _filled(infos[i], args[i]) for i in range(len(infos))]


_write_whole = serialization.async_serialize_from_host


async def _write(held: Any, spec: Any, *, byte_limiter: Any = None, **how: Any) -> None:
    """In the place of Orbax's `async_serialize_from_host`, whose limit lets through all that a device holds of an array
    or nothing: the same for each row of chunks, without a limit where it is less than one of them.
    """
    rows = spec.get("base", spec)["metadata"].get("chunks", ())[:1]
    pieces = [piece for fragment in held.to_fragments().fragments for piece in _rows(fragment, *rows)]
    if max((piece.value.nbytes for piece in pieces), default=0) >= getattr(byte_limiter, "max_bytes", 0):
        byte_limiter = None
    in_pieces: Any = SimpleNamespace(is_on_host=True, to_fragments=lambda: SimpleNamespace(fragments=pieces))
    await _write_whole(in_pieces, spec, byte_limiter=byte_limiter, **how)


def _rows(fragment: Any, count: int = 0) -> list[Any]:
    """A part of an array in pieces of `count` rows."""
    if not count:
        return [fragment]
    first, *others = fragment.index
    return [
        SimpleNamespace(
            index=(slice(first.start + i, min(first.start + i + count, first.stop)), *others),
            value=fragment.value[i : i + count],
        )
        for i in range(0, len(fragment.value), count)
    ]


async def _filled(info: Any, arg: Any) -> jax.Array:
    """A large array, read into its place on this host's devices."""
    shape, sharding = arg.global_shape, arg.sharding
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    store: Any = await ts.open(ts.Spec(spec), open=True, read=True, context=info.ts_context)
    if store.shape != shape:
        raise ValueError(f"{info.name} is of shape {store.shape}, and {shape} was asked for")
    parts, places = {}, {}  # by device: what it holds, and from where to where in the array that is
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts[device] = jnp.zeros(sharding.shard_shape(shape), arg.dtype, device=device)
        places[device] = np.array([axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]).T
    chunk, reads = store.chunk_layout.read_chunk.shape, collections.deque()
    ahead = max(AHEAD // store.dtype.numpy_dtype.itemsize, math.prod(shape) // SHARE) // math.prod(chunk)

    async def place() -> None:
        """Put the oldest of `reads` where it belongs."""
        read, corner, wanted = reads.popleft()
        block = await read
        for device, (low, high) in wanted.items():
            piece, at = block[_slices(low - corner, high - corner)], low - places[device][0]
            with jax.set_mesh(Mesh([device], "x")):  # not the caller's, which is of all devices
                parts[device] = _put(parts[device], piece, at).block_until_ready()

    for corner in map(np.array, itertools.product(*map(range, [0] * len(shape), shape, chunk))):
        end = np.minimum(corner + chunk, shape)
        overlaps = {at: (np.maximum(first, corner), np.minimum(last, end)) for at, (first, last) in places.items()}
        wanted = {device: (low, high) for device, (low, high) in overlaps.items() if (low < high).all()}
        if wanted:
            reads.append((store[_slices(corner, end)].read(), corner, wanted))
        if len(reads) >= max(2, ahead):
            await place()
    while reads:
        await place()
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _put(part: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, block.astype(part.dtype), tuple(at))


def _slices(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
    return tuple(map(slice, low.tolist(), high.tolist()))
