"""What can be said of a run without a compiler for its devices: what they hold, send, and need at least.

    devices("gpu:h100x16")             16 stand-ins, 8 a host
    kept(parts, batch, mesh)           bytes that the backward pass is left by the forward pass, on a device
    sends(parts, config, mesh)         what training sends over each axis of the mesh, by the ring algorithm

Stand-ins make a mesh like real devices do; the model is traced for them, with the kernels that it would have there.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from jaxlm import axes, chips, lookup
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn.loss import tokens_at_once
from jaxlm.planning import costs
from jaxlm.planning.forecast import Plan
from jaxlm.step import Parts

GPUS_A_HOST = 8
GPUS = {kind.removeprefix("NVIDIA ").lower(): kind for kind in chips.CHIPS if kind.startswith("NVIDIA ")}
USUAL = 0.6  # share of the peak that products of large steps reach, about; it only orders what a search tries
AGAIN = ("full", "offload")  # what config.model.remat is where the backward pass computes each layer again
SENDS_IN_PLACE = ("sequence", "tensor")  # axes whose sends stand between products, and cannot run beside them


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device that is neither here nor known to a compiler that is."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    compute_capability: str = "9.0"


def devices(topology: str) -> list[Any]:
    """The stand-ins of `gpu:h100x8`, or of `cpu:8`, which are one host's. Raises `Mistake` for what is neither."""
    found = re.fullmatch(r"gpu:([a-z0-9]+)x(\d+)|cpu:(\d+)", topology)
    if not found or not int(count := found[2] or found[3]):
        raise Mistake(f"--topology={topology}: write gpu:KINDxCOUNT, as in gpu:h100x8, or cpu:COUNT")
    if found[3]:
        return [Device(i, 0, "cpu", "cpu") for i in range(int(count))]
    kind = lookup.key("--topology=gpu:", found[1], GPUS)
    return [Device(i, i // GPUS_A_HOST, "gpu", kind) for i in range(int(count))]


def held(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def hosts(where: list[Any]) -> int:
    """How many hosts the devices belong to."""
    return len({device.process_index for device in where})


def host_rows(rows: int, mesh: Mesh, rules: Mapping[str, Any] = axes.RULES) -> int:
    """How many of a batch's rows the host reads that reads most: those that its devices hold, each once."""
    places = NamedSharding(mesh, axes.spec("B", (rows,), mesh, rules)).devices_indices_map((rows,))
    ranges: dict[int, set[tuple[int, int]]] = {}
    for device, index in places.items():
        ranges.setdefault(device.process_index, set()).add(index[0].indices(rows)[:2])
    return max(sum(stop - start for start, stop in one) for one in ranges.values())


def least_flops(blueprint: Blueprint, length: int) -> float:
    """Model FLOPs of a token that no program does without: unlike in MFU, what a causal mask hides is not counted."""
    seen = length / 2 if blueprint.kind == "decoder" else length
    return blueprint.flops_per_token(min(seen, getattr(blueprint.config, "window", None) or seen))


def kept(parts: Parts, batch: Mapping[str, Any], mesh: Mesh, rules: Mapping[str, Any]) -> float:
    """Bytes a row of the batch that the forward pass leaves to the backward pass, all devices together.

    They are what a traced derivative holds for one more row, but for what the hosts hold. A compiler may keep less,
    where it computes something cheap again, and needs room to work in besides.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def left(rows: int) -> int:
        place = NamedSharding(mesh, axes.spec("B", (rows,), mesh, rules))
        some = {n: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place) for n, x in batch.items()}
        key = jax.eval_shape(lambda: jax.random.key(0)) if parts.blueprint.config.dropout else None

        def backward(params, some, key):
            return jax.vjp(lambda params: parts.task.loss(parts.blueprint.bind(params), some, key).loss, params)[1]

        leaves = jax.make_jaxpr(backward)(parts.shapes["params"], some, key).out_avals
        there = () if axes.platform() == "cpu" else (jax.memory.Space.Host,)  # a CPU is its own host
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves if x.memory_space not in there)

    with axes.on(mesh, rules):
        return (left(2 * ways) - left(ways)) / ways


def at_the_head(parts: Parts, rows: int, length: int, mesh: Mesh, rules: Mapping[str, Any]) -> float:
    """Bytes on a device while it computes the loss, beside what is kept: the head in the products' dtype and its
    gradient in float32, gathered along D, and a chunk's logits and their gradient (`nn/loss.py`). At most: of masked
    tokens the head sees fewer.
    """
    table = parts.blueprint.shapes.get("untied_VD", parts.blueprint.shapes.get("embed_VD"))
    if table is None:
        return 0.0
    (V, D), width = table.shape, np.dtype(parts.blueprint.config.dtype).itemsize
    with axes.on(mesh, rules):
        ways = lambda letter, n: axes.ways(axes.splitting(letter, letter, (n,)))  # noqa: E731
        tokens = rows / ways("B", rows) * min(tokens_at_once(rows, V), length / mesh.shape["sequence"])
        return V / ways("V", V) * (D * (width + 4) + tokens * (4 + width))


def sends(parts: Parts, config: Mapping[str, Any], where: list[Any], mesh: Mesh) -> list[dict[str, Any]]:
    """What a device sends in a step, by collective and axis, and the seconds that it takes the links.

    Parameters split by `fsdp` are gathered for each pass and their gradients scattered, in the products' dtype; other
    gradients are summed; `tensor` gathers the tokens in front of each half of a layer and scatters its sums;
    `sequence` trades tokens for heads.
    """
    found: dict[tuple[str, str], list[float]] = {}
    passes = 3 if getattr(parts.blueprint.config, "remat", "none") in AGAIN else 2
    again, width = config.get("accumulate", 1), np.dtype(parts.blueprint.config.dtype).itemsize
    tokens = config["batch"] * config["length"] // (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"])

    def add(kind: str, axis: str, whole: float, times: float, count: int) -> None:
        total = found.setdefault((kind, axis), [0, 0.0])
        total[0] += count
        total[1] += times * whole * (mesh.shape[axis] - 1) / mesh.shape[axis]

    for path, x in jax.tree_util.tree_leaves_with_path(parts.shapes["params"]):
        letters = axes.of(axes.name_of(path)) or ""
        layers = x.shape[0] if len(x.shape) > len(letters) else 1
        split = {axis for to in x.sharding.spec for axis in axes.names(to)}
        part = math.prod(x.sharding.shard_shape(x.shape)) * width
        for axis in (axis for axis, n in mesh.shape.items() if n > 1):
            if axis == "fsdp" and axis in split:
                add("all-gather", axis, part * mesh.shape[axis], 2 * again, 2 * layers * again)
                add("reduce-scatter", axis, part * mesh.shape[axis], again, layers * again)
            elif axis not in split:
                add("all-reduce", axis, part, 2, 1)
            if axis == "tensor" and axis in split and letters[-1:] == "D" and len(letters) > 1 and letters[0] != "V":
                moved = tokens * x.shape[-1] * width
                add("all-gather", axis, moved, passes * layers, passes * layers * again)
                add("reduce-scatter", axis, moved, passes * layers, passes * layers * again)
            if axis == "sequence" and letters in ("DNH", "DKH"):
                heads = x.sharding.shard_shape(x.shape)[-2] * x.shape[-1]
                moves = 2 if letters == "DNH" else 1  # queries and what is read; of keys and values, each its own
                add(
                    "all-to-all", axis, moves * tokens * heads * width, passes * layers, passes * moves * layers * again
                )
    rows = []
    for (kind, axis), (count, moved) in found.items():
        speed = rate(axis, mesh, where)
        rows.append(dict(kind=kind, axes=axis, count=int(count), bytes=moved, seconds=speed and moved / speed))
    return sorted(rows, key=lambda row: -row["bytes"])


def about(plan: Plan, chip: chips.Chip) -> float:
    """Seconds of a step, to put plans by arithmetic in order: at the share of the peak that is usual, everything
    computed again where all is, and what is sent between products or beside them. Compiled for TPUs, weights are
    gathered beside products at best, and gradients are summed while nothing else runs.
    """
    again = 4 / 3 if plan.remat in AGAIN else 1.0
    work = again * plan.flops_per_step / plan.devices / (USUAL * chip.flops)
    in_place = lambda row: row["axes"] in SENDS_IN_PLACE or row["kind"] != "all-gather"  # noqa: E731
    between = sum(row["seconds"] for row in plan.collectives if in_place(row))
    beside = sum(row["seconds"] for row in plan.collectives) - between
    return max(work, beside) + between


def rate(axis: str, mesh: Mesh, where: list[Any]) -> float | None:
    """Bytes/s that a device sends over one axis of the mesh; None where nothing is known of its links.

    TPUs have a torus. GPUs of a host reach each other through a switch, all at once; what lies on several hosts, by the
    network.
    """
    chip = chips.of(where[0].device_kind)
    if chip is None:
        return None
    names = list(mesh.shape)
    reach = math.prod(mesh.shape[name] for name in names[names.index(axis) :])
    if where[0].platform == "tpu":
        return chip.within(mesh.shape[axis], costs.torus(where))
    inside = sum(device.process_index == where[0].process_index for device in where)
    return chip.link if reach <= inside else chip.outside
