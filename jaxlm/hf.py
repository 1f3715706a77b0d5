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
from jaxlm.lookup import Mistake

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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


def read_json(path: epath.Path) -> Any:
    """What a JSON file holds. Raises `Mistake` where it is none."""
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise Mistake(f"{path} is not JSON: {e}") from None


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


def read_rope(config: Mapping[str, Any], which: str | None = None) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` from a config.json, as transformers 5 writes it or older ones did; `which` of
    several kinds of layers.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if which in rope:
        rope = rope[which]
    base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return dict(rope_base=base)
    known = dict(
        factor="factor", low_freq="low_freq_factor", high_freq="high_freq_factor", beta_fast="beta_fast",
        beta_slow="beta_slow", attention="attention_factor", original="original_max_position_embeddings",
    )  # fmt: skip
    extra = set(rope) - set(known.values()) - {"rope_theta", "rope_type", "type", "truncate"}
    if kind not in ("linear", "llama3", "yarn") or rope.get("truncate") is False or any(rope[k] for k in extra):
        raise Mistake(f"config.json: rope_parameters {dict(rope)} are none that jaxlm knows: linear, llama3, yarn")
    scaling = dict(kind=kind, original=config["max_position_embeddings"] if kind == "yarn" else 0)
    scaling |= {ours: rope[theirs] for ours, theirs in known.items() if rope.get(theirs) is not None}
    return dict(rope_base=base, rope_scaling={k: v for k, v in scaling.items() if v is not None})


def write_rope(c: Any) -> dict[str, Any]:
    """The same for export, from a Config with `rope_base` and `rope_scaling`."""
    rope: dict[str, Any] = dict(rope_theta=c.rope_base, rope_type="default")
    if s := c.rope_scaling:
        rope |= dict(rope_type=s.kind, factor=s.factor)
        if s.kind != "linear":
            rope["original_max_position_embeddings"] = s.original
        if s.kind == "llama3":
            rope |= dict(low_freq_factor=s.low_freq, high_freq_factor=s.high_freq)
        if s.kind == "yarn":
            rope |= dict(beta_fast=s.beta_fast, beta_slow=s.beta_slow, attention_factor=s.attention)
    return dict(rope_parameters={key: value for key, value in rope.items() if value is not None})


def attention(theirs: str, ours: str, names: str = "q_proj k_proj v_proj o_proj") -> dict[str, tuple[str, str]]:
    """The tensors of `nn.attention.Attention` at `ours`; `names` are those of q, k, v and output at `theirs`."""
    q, k, v, o = (f"{theirs}.{name}" for name in names.split())
    return {
        f"{q}.weight": (f"{ours}.wq_DNH", "(N H) D -> D N H"),
        f"{k}.weight": (f"{ours}.wk_DKH", "(K H) D -> D K H"),
        f"{v}.weight": (f"{ours}.wv_DKH", "(K H) D -> D K H"),
        f"{o}.weight": (f"{ours}.wo_NHD", "D (N H) -> N H D"),
        f"{q}.bias": (f"{ours}.bias_q_NH", "(N H) -> N H"),
        f"{k}.bias": (f"{ours}.bias_k_KH", "(K H) -> K H"),
        f"{v}.bias": (f"{ours}.bias_v_KH", "(K H) -> K H"),
        f"{o}.bias": (f"{ours}.bias_D", "D -> D"),
        f"{theirs}.q_norm.weight": (f"{ours}.q_norm.scale_H", "H -> H"),
        f"{theirs}.k_norm.weight": (f"{ours}.k_norm.scale_H", "H -> H"),
    }


def norms(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The tensors of norms with or without biases, from their names to ours."""
    both = {f"{theirs}.weight": (f"{ours}.scale_D", "D -> D") for theirs, ours in names.items()}
    return both | {f"{theirs}.bias": (f"{ours}.bias_D", "D -> D") for theirs, ours in names.items()}


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
        params: dict[str, jax.Array] = {}
        size = lambda part: sum(np.prod(flat[path].shape[len(part[2]) :]) for path in part[1])  # noqa: E731
        for name, ours, at, pattern in sorted(plan, key=size, reverse=True):  # the largest while there is most room
            if name not in names:
                continue
            tensor = files.read(names[name])
            for path, part in zip(ours, _into(tensor, pattern, ours, flat, at, f"{folder}: {names[name]}")):
                params[path] = _place(params.get(path), part, at, flat[path].shape, places[path])
    return _nest(shapes, params)


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


def _place(
    old: jax.Array | None, part: np.ndarray, at: tuple[int, ...], shape: tuple[int, ...], place: NamedSharding
) -> jax.Array:
    """Put a part on the devices that hold it; one layer (or expert) goes into its place in the stack."""
    if not at:
        return jax.device_put(np.ascontiguousarray(part, np.float32), place)
    spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    inner = NamedSharding(place.mesh, PartitionSpec(*spec[len(at) :]))
    layer = jax.device_put(np.ascontiguousarray(part, np.float32), inner)
    if old is None:
        old = jax.jit(lambda: jax.numpy.zeros(shape, np.float32), out_shardings=place)()
    return _set(place)(old, layer, np.array(at, np.int32))


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
