"""Serving, planned: the engine's own prefill and decode, compiled for devices that are not here, or counted.

    make(config, devices, words=words, rows=16, prompt=1024, new=512)      a `forecast.Serving`

Weights are placed and held as the engine holds them (in the dtype of products, split by the letters in their names); so
is its cache. A decode call runs `STEPS` tokens, and what it does once is shared among them. A token's time is that of
one that is drawn at a temperature; what top-k, top-p, penalties and bans would add, all together, is told apart.
"""

from collections.abc import Mapping
import math
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from jaxlm import axes, chips, hlo, lookup, objectives
from jaxlm.data.words import Words
from jaxlm.decode.engine import STEPS, Engine, bucket
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint, Tree
from jaxlm.planning import costs
from jaxlm.planning.arithmetic import Device, held
from jaxlm.planning.costs import Cost
from jaxlm.planning.forecast import Serving

SMALLER = "Try fewer --rows, shorter ones, or more devices under config.mesh.tensor"


class Served(NamedTuple):
    """A model and the state of its rows behind their prompts as shapes in their places, and the engine's programs, or
    none where no compiler is here.
    """

    blueprint: Blueprint
    mesh: Mesh
    params: Tree
    state: Any
    prefill: jax.stages.Compiled | None
    decode: jax.stages.Compiled | None


def assemble(
    config: Mapping[str, Any], where: list[Any], *, words: Words, rows: int, prompt: int, new: int, slices: int = 1
) -> Served:  # fmt: skip
    """Compile the engine's programs for a batch of `rows` prompts on these devices. Raises as `make`."""
    lookup.within("--", 1, rows=rows, prompt=prompt, new=new)
    mesh = lookup.spend("config.mesh", axes.mesh, {**(config.get("mesh") or {}), "slices": slices}, devices=where)
    rules = {**axes.RULES, **(config.get("rules") or {})}
    with axes.on(mesh, rules):
        dtype = config.get("dtype", "auto")
        if dtype == "auto":
            dtype = "float32" if axes.platform() == "cpu" else "bfloat16"
        blueprint = Blueprint.of(config.get("model") or {}, vocab=words.vocab, dtype=dtype)
        _check(blueprint, prompt, new)
        both_ways = objectives.both_ways(config.get("objective")) and blueprint.kind == "decoder"
        engine = Engine(blueprint, {}, words.vocab, both_ways)
        shapes = jax.eval_shape(engine.held, blueprint.shapes)
        params = jax.tree.map(_placed, shapes, axes.shardings(shapes, mesh, rules))
        first, slots = _prompts(blueprint, rows, prompt, new)
        if isinstance(where[0], Device) or engine.in_a_row:  # a CPU's weights are laid out anew from real arrays
            state = jax.eval_shape(lambda *args: engine.prefill(*args, slots=slots), params, *first)
            state = jax.tree.map(_placed, state, axes.shardings(state, mesh, rules))
            return Served(blueprint, mesh, params, state, None, None)
        lowered = engine.prefill.lower(params, *first, slots=slots)
        prefill = costs.build(lowered, SMALLER)
        state = jax.tree.map(_placed, lowered.out_info, prefill.output_shardings)
        asked = np.zeros(state.done_B.shape, bool), Sampling().rows(len(state.done_B)), engine.mark(())
        decode = costs.build(engine.decode.lower((params, None), state, *asked, np.int32(STEPS)), SMALLER)
    return Served(blueprint, mesh, params, state, prefill, decode)


def make(
    config: Mapping[str, Any], where: list[Any], *, words: Words, rows: int, prompt: int, new: int, slices: int = 1
) -> Serving:
    """Weigh a batch of `rows` prompts and what is written behind them. Raises `Mistake` for an encoder, for rows longer
    than the model can read, and for what does not fit, with the compiler's figures.
    """
    begun = time.perf_counter()
    served = assemble(config, where, words=words, rows=rows, prompt=prompt, new=new, slices=slices)
    mesh, known = served.mesh, _bounds(served, where, rows, prompt, new)
    if served.prefill is None or served.decode is None:
        return Serving(**known, compiled=False, peak_bytes=known["parameter_bytes"] + known["cache_bytes"])
    needs = [costs.memory(program, where[0].platform) for program in (served.prefill, served.decode)]
    known |= dict(
        compiled=True, prefill_temporary_bytes=needs[0][0], decode_temporary_bytes=needs[1][0],
        peak_bytes=max(peak for _, peak in needs), compile_seconds=time.perf_counter() - begun,
    )  # fmt: skip
    chip = chips.of(where[0].device_kind)
    if not chip or not chip.clock:
        return Serving(**known)
    cost = lambda program, wanted=False: Cost(  # noqa: E731
        hlo.read(program.as_text() or "", STEPS, wanted), mesh, chip, costs.torus(where), slices
    )
    reading, writing = cost(served.prefill), cost(served.decode)
    token, most = writing.step / STEPS, cost(served.decode, wanted=True).step / STEPS
    share = lambda found: [dict(row, seconds=row["seconds"] / STEPS) for row in found]  # noqa: E731
    return Serving(
        **known, prefill_seconds=reading.step, token_seconds=token, options_seconds=most - token,
        expert_seconds=writing.experts / STEPS, tokens_per_second_per_device=rows / token / mesh.size,
        uncounted=sorted({*reading.uncounted, *writing.uncounted}), operations=share(writing.dearest(10)),
        collectives=[
            dict(row, count=round(row["count"] / STEPS), bytes=row["bytes"] / STEPS) for row in share(writing.sent())
        ],
    )  # fmt: skip


def _check(blueprint: Blueprint, prompt: int, new: int) -> None:
    context, pair = blueprint.config.context, blueprint.kind == "encoder-decoder"
    if blueprint.kind == "encoder":
        raise Mistake(f"--mode=serve: {blueprint.name} is an encoder: it continues nothing")
    if max(prompt, new + 1) > context if pair else prompt + new > context:
        raise Mistake(
            f"--prompt={prompt} and --new={new} are more than the {context:,} tokens that config.model.context has"
        )


def _prompts(blueprint: Blueprint, rows: int, prompt: int, new: int) -> tuple[tuple, int]:
    """What the engine's prefill is given for so many full prompts, as shapes, in its buckets; and the cache's slots."""
    context, pair = blueprint.config.context, blueprint.kind == "encoder-decoder"
    slots = bucket(min((1 if pair else prompt) + new, context), 64, context)
    most, B = bucket(prompt, 16, context if pair else slots), bucket(rows)
    one = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    numbers = one(np.int32, B), one(np.int32, B), one(np.uint32), one(np.uint32, B), one(np.uint32, B)
    return (one(np.int32, B, most), *numbers, None), slots


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _bounds(served: Served, where: list[Any], rows: int, prompt: int, new: int) -> dict[str, Any]:
    """What is known by shapes and places, and what no program can be faster than: each product at the peak, and for a
    token every weight that it needs and the cache filled so far read once.
    """
    blueprint, mesh, params, state, _, _ = served
    chip, c, pair = chips.of(where[0].device_kind), blueprint.config, blueprint.kind == "encoder-decoder"
    cached = held(state.cache)
    known: dict[str, Any] = dict(
        model=blueprint.name, devices=mesh.size, kind=where[0].device_kind, mesh=dict(mesh.shape), rows=rows,
        prompt=prompt, new=new, parameters=blueprint.size, parameter_bytes=held(params), cache_bytes=cached,
        hbm_bytes=chip and chip.hbm,
    )  # fmt: skip
    if chip is None:
        return known
    reads, writes, weights = 0.0, 0.0, 0.0  # parameters that a prompt's token multiplies by, and a new one; bytes
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name, keys = axes.name_of(path), jax.tree_util.keystr(path)
        if name == "positions_TD" or (name == "embed_VD" and "untied_VD" in blueprint.shapes):
            continue  # rows of it are looked up
        routed = (axes.of(name) or "").startswith("E")
        size = math.prod(x.shape) * (c.chosen / c.experts if routed else 1)
        encodes, writes_out = "encoder" in keys, name in ("embed_VD", "untied_VD")
        reads += size if encodes or not (pair or writes_out) else 0
        if not encodes:
            writes += size
            weights += held(x) * (min(1.0, rows * c.chosen / c.experts) if routed else 1.0)
    filled = (1 if pair else prompt) + new / 2  # on average
    filled = min(filled, getattr(c, "window", None) or filled) / state.cache.slots
    cross = held(state.cache.cross) if state.cache.cross is not None else 0
    reading = (weights + filled * (cached - cross) + cross) / chip.read
    products = 2 * writes * rows / mesh.size / chip.flops
    token = max(reading, products)
    return known | dict(
        prefill_roofline_seconds=2 * reads * rows * prompt / mesh.size / chip.flops, token_roofline_seconds=token,
        bound_by="reading weights and cache" if reading > products else "products",
        most_tokens_per_second_per_device=rows / token / mesh.size,
    )  # fmt: skip
