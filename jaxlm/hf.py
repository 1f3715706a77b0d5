"""Hugging Face folders in and out: safetensors <-> our tree, driven by each model's HF table.

    HF = {"llama": Format(architecture="LlamaForCausalLM", read=..., write=..., tensors={
        "model.layers.{i}.self_attn.q_proj.weight": ("blocks.attn.wq_DNH", "(N H) D -> D N H"),
        "transformer.h.{i}.attn.c_attn.weight": (
            ("blocks.attn.wq_DNH", "blocks.attn.wk_DKH", ...), "D (three N H) -> three D N H"),
    })}

A table's key is a tensor's name in the file, {i} and {e} counting the leading axes of ours (layers, experts); its value
is one of our parameters, or several that the file holds as one, and the einops pattern that turns the file's tensor
into ours. Read from right to left, it exports. What the model does not have (a bias, an untied head) is left out.

Read `restore` first. One tensor is in host memory at a time: it goes to its devices, split as they hold it.
"""

from collections.abc import Callable, Iterator, Mapping, Set
import dataclasses
import functools
import itertools
import json
import re
from typing import Any

import einops
from etils import epath
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxlm import axes
from jaxlm.config import read_json
from jaxlm.lookup import Mistake

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SIZES = dict(  # as most families' config.json calls them
    context="max_position_embeddings", layers="num_hidden_layers", width="hidden_size", heads="num_attention_heads",
    mlp_width="intermediate_size",
)  # fmt: skip
KINDS = ("sliding_attention", "full_attention")  # of `layer_types`: local and global
SHARD = 5 * 10**9  # bytes of one file, at most
SLICE = 2**20  # numbers of a tensor to look at in one go
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Tree = Any
Tensors = Mapping[str, tuple[str | tuple[str, ...], str]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one `model_type` of transformers is written: its class, its config and its tensors."""

    architecture: str | Callable[[Any], str]  # the class that loads it, or that class by our Config
    read: Callable[[Mapping[str, Any], Set[str]], dict[str, Any]]  # config.json, names of tensors -> keys of our Config
    write: Callable[[Any], dict[str, Any]]  # our Config -> config.json
    tensors: Tensors
    prefix: str = ""  # of names in a file; files of the model without its head lack it
    ignored: tuple[str, ...] = ()  # regular expressions: tensors that hold no parameter
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a tied parameter's second name -> its first
    absent: tuple[str, ...] = ()  # single layers' tensors that transformers does not have, and we do not use


def is_folder(folder: epath.PathLike) -> bool:
    """Whether a folder's config.json is one of transformers: it names a `model_type`."""
    path = epath.Path(folder) / CONFIG
    return path.exists() and "model_type" in read_json(path)


def read_config(folder: epath.PathLike) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises `Mistake` where there is none."""
    path = epath.Path(folder) / CONFIG
    if not path.exists():
        raise Mistake(f"{folder} has no {CONFIG}, so it is no Hugging Face folder")
    config = read_json(path)
    if "model_type" not in config:
        raise Mistake(f"{path} names no model_type, so it is not a config of transformers")
    return config


def names(folder: epath.PathLike) -> Set[str]:
    """The names of the tensors in a folder."""
    with _Files(epath.Path(folder)) as files:
        return set(files.where)


def written(form: Format, shapes: Tree) -> Set[str]:
    """The names of the tensors that the export of such a model has."""
    return {name for name, *_ in _expand(form, _flat(shapes))}


def require(config: Mapping[str, Any], **only: Any) -> None:
    """Raise `Mistake` for a setting that is not the one value which the family has; a key left out is that value."""
    for key, value in only.items():
        choices = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in choices:
            raise Mistake(
                f"config.json: {key}={config[key]!r}, but this family has {' or '.join(map(repr, choices))} only"
            )


def read_sizes(config: Mapping[str, Any], names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """Keys of our Config from a config.json, which calls them by `names`."""
    return {ours: config[theirs] for ours, theirs in names.items()}


def write_sizes(c: Any, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """The same for export."""
    return {theirs: getattr(c, ours) for ours, theirs in names.items()}


def read_grouped(config: Mapping[str, Any]) -> dict[str, Any]:
    """`read_sizes`, and what decoders with grouped queries and RMSNorm have besides."""
    sizes = read_sizes(config)
    heads, width, eps = sizes["heads"], sizes["width"], config.get("rms_norm_eps", 1e-6)
    kv_heads, head_width = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    return sizes | dict(kv_heads=kv_heads, head_width=head_width, norm_eps=eps)


def write_grouped(c: Any) -> dict[str, Any]:
    """The same for export."""
    return write_sizes(c) | dict(num_key_value_heads=c.kv_heads, head_dim=c.head_width, rms_norm_eps=c.norm_eps)


def read_every(config: Mapping[str, Any], default: int, at: int) -> int:
    """How many layers from one that is global to the next, by `layer_types`, else `default`; of each so many it is the
    first one (`at` 0) or the last (-1).
    """
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if not kinds:
        return default
    found = (i - at for i, kind in enumerate(kinds) if i > at and kind == KINDS[True])
    every = next(found, max(default, layers - at))
    if kinds != [KINDS[(i - at) % every == 0] for i in range(layers)]:
        raise Mistake(f"config.json: layer_types {kinds} are not global at every so-manyth layer")
    return every


def restore(
    folder: epath.PathLike, form: Format, shapes: Tree, *, mesh: Mesh, rules: Mapping[str, Any] = axes.RULES
) -> Tree:
    """The folder's weights as our tree of float32 arrays of `shapes` (the Blueprint's), each placed by its name.

    Raises `Mistake` for a file that is missing or cut off, for tensors that are missing or that the model has no place
    for, and for a shape that does not fit.
    """
    with _Files(epath.Path(folder)) as files:
        names = _rename(files, form)
        plan = list(_expand(form, _flat(shapes)))
        _check(folder, form, shapes, plan, names)
        _compare(folder, form, plan, names, files)
        places, flat = _flat(axes.shardings(shapes, mesh, rules)), _flat(shapes)
        params: dict[str, Any] = {}
        size = lambda part: sum(np.prod(flat[path].shape[len(part[2]) :]) for path in part[1])  # noqa: E731
        for name, ours, at, pattern in sorted(plan, key=size, reverse=True):  # the largest while there is most room
            if name not in names:
                continue
            tensor = files.read(names[name])
            for path, part in zip(ours, _into(tensor, pattern, ours, flat, at, f"{folder}: {names[name]}")):
                params[path] = _place(params.get(path), part, at, flat[path].shape, places[path])
    return _nest(shapes, {path: jax.device_put(x, places[path]) for path, x in params.items()})


def export(
    folder: epath.PathLike, form: Format, params: Tree, config: Mapping[str, Any], *, dtype: str = "float32",
    shard: int = SHARD,
) -> None:  # fmt: skip
    """Write `config` and the weights as a Hugging Face folder; the weights in files of at most `shard` bytes."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = _flat(params)
    groups: list[dict[str, tuple]] = [{}]
    size = total = 0
    bare = re.search(r"(?<!Head)Model$", config["architectures"][0])  # without its head: names without their prefix
    for name, ours, at, pattern in _expand(form, flat):
        name = name.removeprefix(form.prefix) if bare else name
        bytes_ = sum(int(np.prod(flat[path].shape[len(at) :])) for path in ours) * np.dtype(DTYPES[dtype]).itemsize
        if size + bytes_ > shard and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = (ours, at, pattern)
        size, total = size + bytes_, total + bytes_
    where = {}
    for n, group in enumerate(groups, 1):
        file = WEIGHTS if len(groups) == 1 else f"model-{n:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _out_of(flat, *rest).astype(DTYPES[dtype]) for name, rest in group.items()}
        safetensors.numpy.save_file(tensors, str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    if len(groups) > 1:
        (folder / INDEX).write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=where), indent=2))
    (folder / CONFIG).write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


class _Files:
    """The tensors of a folder by name, in one file or several."""

    def __init__(self, folder: epath.Path):
        self._folder, self._open = folder, {}
        if (folder / INDEX).exists():
            self.where: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        elif (folder / WEIGHTS).exists():
            self.where = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        else:
            old = [path.name for path in folder.glob("pytorch_model*")]
            hint = f"; {old[0]} is a pickle, which jaxlm does not open: save it as safetensors" if old else ""
            raise Mistake(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
        held = {file: set(self._file(file).keys()) for file in sorted(set(self.where.values()))}
        for name, file in self.where.items():
            if name not in held[file]:
                raise Mistake(f"{folder / file} lacks {name!r}, which {INDEX} promises")

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            if not path.exists():
                raise Mistake(f"{path} is missing; {INDEX} names it")
            try:  # not mapped: a mapped file's pages would count as ours
                self._open[name] = safetensors.safe_open(str(path), "np", backend="pread")
            except safetensors.SafetensorError as e:
                raise Mistake(f"{path} is damaged or cut off: {e}") from None
        return self._open[name]

    def read(self, name: str) -> np.ndarray:
        return self._file(self.where[name]).get_tensor(name)

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """The tensor in parts of a few megabytes, in order."""
        part = self._file(self.where[name]).get_slice(name)
        shape = part.get_shape()
        rows = max(1, SLICE // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], rows):
            yield part[start : min(start + rows, shape[0])]


def _rename(files: _Files, form: Format) -> dict[str, str]:
    """The tensors that hold parameters: full name -> name in the file."""
    patterns = {re.compile(re.sub(r"\\{\w\\}", r"\\d+", re.escape(key))) for key in form.tensors}

    def full(name: str) -> str:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # as early BERTs call them
        return name if any(p.fullmatch(name) for p in patterns) else form.prefix + name

    names = {}
    for name in files.where:
        if any(re.fullmatch(ignored, name) for ignored in form.ignored):
            continue
        names[name if name in form.copies else full(name)] = name
    return names


def _expand(form: Format, flat: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...], str]]:
    """Each tensor that the model has: its name, our paths, its place on their leading axes, and the pattern."""
    for key, (ours, pattern) in form.tensors.items():
        ours = (ours,) if isinstance(ours, str) else ours
        if any(path not in flat for path in ours):
            continue
        letters = dict.fromkeys(re.findall(r"\{(\w)\}", key))
        for at in itertools.product(*(range(n) for n in flat[ours[0]].shape[: len(letters)])):
            name = key.format(**dict(zip(letters, at)))
            if name not in form.absent:
                yield name, ours, at, pattern


def _check(folder: Any, form: Format, shapes: Tree, plan: list, names: Mapping[str, str]) -> None:
    wanted = {name for name, *_ in plan}
    extra = sorted(set(names) - wanted - set(form.copies))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise Mistake(f"{folder}: the model has no place for {extra[0]!r}{more}; does config.json belong to them?")
    missing = sorted(wanted - set(names))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Mistake(f"{folder}: the weights lack {missing[0]!r}{more}")
    ours = {path for _, paths, *_ in plan for path in paths}
    if left := sorted(set(_flat(shapes)) - ours):
        raise AssertionError(f"the HF table says nothing of {left}")


def _compare(folder: Any, form: Format, plan: list, names: Mapping[str, str], files: _Files) -> None:
    """What a file holds twice has to be equal: the model has it once."""
    for copy in (set(form.copies) - {name for name, *_ in plan}) & set(names):
        first, second = names[form.copies[copy]], names[copy]
        parts = itertools.zip_longest(files.slices(first), files.slices(second), fillvalue=np.zeros(0))
        if not all(np.array_equal(a, b) for a, b in parts):
            raise Mistake(
                f"{folder}: {second!r} differs from {first!r}, but config.json ties them; is tie_word_embeddings right?"
            )


def _sizes(path: str, shape: tuple[int, ...]) -> dict[str, int]:
    letters = axes.of(path.rpartition(".")[2]) or ""
    return dict(zip(letters, shape[len(shape) - len(letters) :]))


def _into(tensor: np.ndarray, pattern: str, ours: tuple, flat: Mapping, at: tuple, where: str) -> Iterator[np.ndarray]:
    """The parts of a file's tensor, in our shapes."""
    sizes = functools.reduce(lambda a, b: a | b, (_sizes(path, flat[path].shape) for path in ours))
    want = [tuple(flat[path].shape[len(at) :]) for path in ours]
    try:
        found = einops.rearrange(tensor, pattern, **_named(pattern, sizes, len(ours)))
    except einops.EinopsError:
        raise Mistake(f"{where} has shape {tensor.shape}, which does not make {', '.join(ours)} {want[0]}") from None
    parts = list(found) if len(ours) > 1 else [found]
    if [part.shape for part in parts] != want:
        raise Mistake(f"{where} has shape {tensor.shape}, which does not make {', '.join(ours)} {want[0]}")
    return iter(parts)


def _out_of(flat: Mapping, ours: tuple, at: tuple, pattern: str) -> np.ndarray:
    """A file's tensor from our parameters: the pattern from right to left."""
    left, right = (side.strip() for side in pattern.split("->"))
    parts = [np.asarray(flat[path][at] if at else flat[path]) for path in ours]
    sizes = functools.reduce(lambda a, b: a | b, (_sizes(path, flat[path].shape) for path in ours))
    back = f"{right} -> {left}"
    whole = np.stack(parts) if len(ours) > 1 else parts[0]
    return np.ascontiguousarray(einops.rearrange(whole, back, **_named(back, sizes, len(ours))))


def _named(pattern: str, sizes: dict[str, int], parts: int) -> dict[str, int]:
    """The sizes of the axes that a pattern names; a word in it counts the parts of a tensor that holds several."""
    words = set(re.findall(r"[A-Za-z]+", pattern))
    return {word: sizes.get(word, parts) for word in words if word in sizes or parts > 1}


def _place(old: Any, part: np.ndarray, at: tuple[int, ...], shape: tuple[int, ...], place: NamedSharding) -> Any:
    """Put a part on the devices that hold it; one layer (or expert) goes into its place in the stack. For a CPU the
    array is filled where it will lie: nothing is compiled for it, and no copy waits in the background.
    """
    if [device.platform for device in place.device_set] == ["cpu"]:
        old = _aligned(shape) if old is None else old
        old[at] = part
        return old
    if not at:
        return jax.device_put(np.ascontiguousarray(part, np.float32), place)
    spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    inner = NamedSharding(place.mesh, PartitionSpec(*spec[len(at) :]))
    layer = jax.device_put(np.ascontiguousarray(part, np.float32), inner)
    if old is None:
        old = _zeros(shape, place)()
    return _set(place)(old, layer, np.array(at, np.int32))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that begins where JAX wants arrays to begin: it takes such a one without a copy."""
    size = 4 * int(np.prod(shape))
    bytes_ = np.empty(size + 63, np.uint8)
    first = -bytes_.ctypes.data % 64
    return bytes_[first : first + size].view(np.float32).reshape(shape)


@functools.cache
def _zeros(shape: tuple[int, ...], place: NamedSharding) -> Callable:
    return jax.jit(lambda: jax.numpy.zeros(shape, np.float32), out_shardings=place)


@functools.cache
def _set(place: NamedSharding) -> Callable:
    def put(stack, layer, at):
        start = (*at, *[0] * layer.ndim)
        return jax.lax.dynamic_update_slice(stack, layer.reshape((1,) * len(at) + layer.shape), start)

    return jax.jit(put, donate_argnums=0, out_shardings=place)


def _flat(tree: Tree) -> dict[str, Any]:
    """A tree by dotted paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}


def _nest(shapes: Tree, flat: Mapping[str, Any]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(shapes), [flat[path] for path in _flat(shapes)])
