"""The alphabet: one letter per axis, for the whole project; a name that ends in `_BTD` promises an array with those
axes.

    B batch   T query length   S key length   D model width   F mlp width   V vocabulary   N query heads
    K key/value heads   G = N/K   H head width   E experts   R LoRA rank   C classes   L layers

In a recurrent layer F is the width of the state, and G are the gates.

The same letters check shapes while tracing (`shaped`) and place every array on the mesh (`shardings`, `constrain`):
a rule table says which mesh axes may split a letter. Letters are served from the left, T behind all others, and a mesh
axis serves once, so one table does for parameters and activations:

    wq_DNH    L stage, D fsdp x expert, N tensor      of stacked layers; other parameters' D is split by stage, too
    up_EDF    L stage, E expert, D fsdp, F tensor
    x_BTD     B data x fsdp x expert, T sequence x tensor    between layers devices have tokens of their own; D has none
    q_BNTH    B data x fsdp x expert, N tensor, T sequence   so has h_BTF: tensor splits what is wide, T what is left

So around each layer the tokens are gathered over `tensor`, and its sums scattered (arXiv:2205.05198). Attention over
tokens that `sequence` splits is `nn/context.py`; `nn/moe.py` sends tokens to the experts that `expert` splits. How rows
go through layers that `stage` splits is `nn/pipeline.py`; before and behind them B is split by stage, too. Batches
themselves are split by B alone: a row of ids is small.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import functools
import inspect
import logging
import math
import re
from typing import Any, TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxlm.lookup import Mistake, miss, within

ALPHABET = "BTSDFVNKGHERCL"
MESH_AXES = ("data", "stage", "fsdp", "expert", "sequence", "tensor")
RULES: Mapping[str, str | tuple[str, ...]] = {
    "L": "stage", "B": ("stage", "data", "fsdp", "expert"), "D": ("fsdp", "expert", "stage"), "E": "expert",
    "V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor", "T": ("sequence", "tensor"),
}  # fmt: skip

Function = TypeVar("Function", bound=Callable)
_place: contextvars.ContextVar[tuple[Mesh, Mapping] | None] = contextvars.ContextVar("place", default=None)


@functools.cache
def of(name: str) -> str | None:
    """The letters that a name promises: `wq_DNH` -> `DNH`; None where it promises nothing."""
    match = re.search(rf"_([{ALPHABET}]+)$", name)
    return match[1] if match else None


def name_of(path: tuple) -> str:
    """The innermost lettered name on a pytree path, or the empty string."""
    names = re.findall(r"\w+", jax.tree_util.keystr(path))
    return next((n for n in reversed(names) if of(n)), "")


def shaped(fn: Function) -> Function:
    """Check array arguments against the letters in their names, while tracing, so at no cost when running.

    Raises TypeError when the number of axes differs, or when one letter stands for two sizes.
    """
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def checked(*args, **kwargs):
        sizes = {}
        for name, x in signature.bind(*args, **kwargs).arguments.items():
            letters = of(name)
            if letters is None or x is None:
                continue
            if len(letters) != len(x.shape):
                raise TypeError(f"{fn.__qualname__}: {name} has shape {x.shape}")
            for letter, size in zip(letters, x.shape):
                if sizes.setdefault(letter, size) != size:
                    known = f"but {letter}={sizes[letter]} elsewhere"
                    raise TypeError(f"{fn.__qualname__}: {name} has {letter}={size}, {known}")
        return fn(*args, **kwargs)

    return checked  # type: ignore[return-value]


def mesh(
    *, data: int = -1, stage: int = 1, fsdp: int = 1, expert: int = 1, sequence: int = 1, tensor: int = 1,
    slices: int = 1, devices: Any = None,
) -> Mesh:  # fmt: skip
    """Arrange the devices (all unless given) in the order of `MESH_AXES`; one size may be -1: what is left.

    Slices are joined by the slow network, so they only ever divide the data axis. What is too large for one slice may
    be split over all by the rule D=("fsdp", "data"): in this order, only parts of it cross. Sizes that ask for fewer
    devices than one host has leave the others idle, and the log says so. Raises `Mistake` when the sizes fit the
    devices in no way.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = dict(data=data, stage=stage, fsdp=fsdp, expert=expert, sequence=sequence, tensor=tensor)
    within("config.mesh.", 1, slices=slices, **{name: n for name, n in asked.items() if n != -1})
    sizes = dict(asked)
    known = math.prod(n for n in sizes.values() if n != -1)
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) == 1 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    count = math.prod(sizes.values())
    if min(sizes.values()) < 1 or count > len(devices) or (count < len(devices) and (free or jax.process_count() > 1)):
        raise Mistake(f"config.mesh {asked} does not fit {len(devices)} devices; one size may be -1")
    if count < len(devices):
        _say_once(f"config.mesh uses {count} of {len(devices)} devices")
        devices = devices[:count]
    if sizes["data"] % slices:
        raise Mistake(f"mesh: data={sizes['data']} does not divide over slices={slices}")
    shape, found = tuple(sizes.values()), len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if slices != found:
            raise Mistake(f"config.mesh.slices={slices}, but the devices are of {found}")
        inner = (shape[0] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, *(1 for _ in inner[1:])), devices=devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES)


@contextlib.contextmanager
def on(mesh: Mesh, rules: Mapping[str, Any] = RULES) -> Iterator[Mesh]:
    """Within this block, `constrain` places activations on `mesh` by `rules`."""
    check_rules(rules, mesh)
    token = _place.set((mesh, rules))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _place.reset(token)


def here() -> tuple[Mesh, Mapping] | None:
    """The mesh and rules of the enclosing `on`, if any; within a `shard_map` without the axes that it is over, and none
    where these are all.
    """
    place, inside = _place.get(), jax.sharding.get_abstract_mesh().manual_axes
    if place is None or not inside:
        return place
    if len(inside) == len(place[0].shape):
        return None
    return place[0], {
        letter: tuple(axis for axis in names(to) if axis not in inside) for letter, to in place[1].items()
    }


def device() -> Any:
    """One of the enclosing mesh's devices, or of those here (also when compiling for devices that are not here)."""
    place = _place.get()
    return place[0].devices.flat[0] if place else jax.devices()[0]


def platform() -> str:
    """What the devices are: cpu, gpu or tpu."""
    return device().platform


def check_rules(rules: Mapping[str, Any], mesh: Mesh) -> None:
    """Raise `Mistake` for a letter outside the alphabet or a mesh axis that does not exist."""
    for letter, to in rules.items():
        if letter not in ALPHABET:
            raise miss("config.rules", letter, ALPHABET)
        for axis in (to,) if isinstance(to, str) else to:
            if axis not in mesh.shape:
                raise miss(f"config.rules[{letter!r}]", axis, mesh.shape)


def spec(
    letters: str, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, Any] = RULES, name: str = ""
) -> PartitionSpec:
    """Which mesh axes split which of an array's axes: of those in the rules, the first ones that divide it. Where some
    do not, the log says so once; but layers that do not divide over stages are a `Mistake`.
    """
    letters = "L" * (len(shape) - len(letters)) + letters  # scanned layers have one more leading axis
    used: set[str] = set()
    out: list[Any] = [None] * len(shape)
    for at, letter in sorted(enumerate(letters), key=lambda one: one[1] == "T"):
        to = rules.get(letter, ())
        asked = tuple(a for a in ((to,) if isinstance(to, str) else to) if a not in used and mesh.shape[a] > 1)
        to, size = asked, shape[at]
        while size % math.prod(mesh.shape[a] for a in to):
            to = to[:-1]
        if to != asked and letter == "L":
            fit = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            asked = " x ".join(f"config.mesh.{a}={mesh.shape[a]}" for a in asked)
            raise Mistake(f"{asked} does not divide the {size} layers of {name or letters}; what does: {fit}")
        if to != asked and (letter != "T" or size > 1):  # that a single token, as in decoding, is not split is no news
            parts, kept = (" x ".join(f"{a}={mesh.shape[a]}" for a in some) for some in (asked, to))
            done = f"split over {kept}" if to else "not split"
            _say_once(f"{name or letters}: axis {letter} of size {size} does not divide over {parts}; {done}")
        used.update(to)
        out[at] = None if not to else to[0] if len(to) == 1 else to
    return PartitionSpec(*out)


def names(to: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return () if to is None else (to,) if isinstance(to, str) else tuple(to)


def splitting(letter: str, letters: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes that split one letter of such an array on the mesh of the enclosing `on`; none without one."""
    place = here()
    return () if place is None else names(spec(letters, shape, *place)[letters.index(letter)])


def ways(names: tuple[str, ...]) -> int:
    """In how many parts these axes of the mesh of the enclosing `on` split."""
    place = here()
    return 1 if place is None else math.prod(place[0].shape[name] for name in names)


def free() -> set[str]:
    """The mesh axes of the enclosing `on` that no enclosing `shard_map` is over."""
    place = _place.get()
    return set() if place is None else set(place[0].shape) - set(jax.sharding.get_abstract_mesh().manual_axes)


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger("jaxlm").info(line)


def shardings(tree: Any, mesh: Mesh, rules: Mapping[str, Any] = RULES) -> Any:
    """Place each array by the letters in its name, one more leading axis allowed; no name, no split."""

    def place(path, x):
        name = name_of(path)
        letters = of(name) or ""
        if not 0 <= len(x.shape) - len(letters) <= 1:
            letters = ""  # an optimizer's factored statistics: named as the parameter, but of another shape
        return NamedSharding(mesh, spec(letters, x.shape, mesh, rules, name) if letters else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def alone() -> bool:
    """Whether no other device shares the work: there is no enclosing `on`, or its mesh is of one device."""
    place = here()
    return place is None or place[0].size == 1


def constrain(x: jax.Array, letters: str, **beside: int) -> jax.Array:
    """Pin an activation to its place on the mesh of the enclosing `on`; without one, x itself.

    `beside` are letters, and their sizes, that are not x's, and take what they would if they were: what a layer reads,
    `constrain(x_BTD, "BTD", F=F)`, has T split as its h_BTF will have.
    """
    place = here()
    if place is None or place[0].size == 1:
        return x
    mesh, rules = place
    to = PartitionSpec(*spec(letters + "".join(beside), (*x.shape, *beside.values()), mesh, rules)[: x.ndim])
    inside = jax.sharding.get_abstract_mesh().manual_axes  # of a shard_map, whose mesh is not this one
    return jax.lax.with_sharding_constraint(x, to if inside else NamedSharding(mesh, to))


def summed(x: jax.Array, letters: str, **beside: int) -> jax.Array:
    """What a layer adds, summed over what its `beside` is split by: tokens stay as `sequence` splits them. Where it
    splits none, x itself: each device then keeps the sums of its own tokens alone.
    """
    inside = splitting("T", letters + "".join(beside), (*x.shape, *beside.values()))
    return constrain(x, letters, **beside) if inside else x


def cut(letters: str) -> tuple[str, str]:
    """Split a weight's axes into (in, out) around the model width: `DNH` -> (`D`, `NH`), `NHD` -> (`NH`, `D`)."""
    return (letters[0], letters[1:]) if letters[0] == "D" else (letters[:-1], letters[-1])


def is_matrix(path: tuple) -> bool:
    """Whether a parameter is a matrix or an embedding; vectors, norms and biases (`bias_NH`) are not."""
    name = name_of(path)
    return len(of(name) or "") > 1 and not name.startswith("bias")


def local_rows(rows: int, mesh: Mesh, rules: Mapping[str, Any] = RULES) -> list[tuple[int, int]]:
    """The ranges [start, stop) of a batch's rows that this process's devices hold, in order, each once."""
    sharding = NamedSharding(mesh, spec("B", (rows,), mesh, rules))
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({index[0].indices(rows)[:2] for index in held if index is not None})


def put(
    batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh, rules: Mapping[str, Any] = RULES
) -> dict[str, jax.Array]:
    """Global arrays [rows, ...] split by B, from this process's rows, which lie in the order of `local_rows`."""
    ranges = local_rows(rows, mesh, rules)
    first = dict(zip((start for start, _ in ranges), np.cumsum([0] + [stop - start for start, stop in ranges])))

    def place(x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(rows)
            return x[first[start] : first[start] + stop - start]

        shape = (rows, *x.shape[1:])
        sharding = NamedSharding(mesh, spec("B", (rows,), mesh, rules))
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(x) for name, x in batch.items()}
