"""Compile a config's train step for devices that are not here: does it fit, how fast is it, what takes the time?

    jaxlm plan --config=configs/tpu/published.py:llama3.1-8b --topology=v6e:16x16
    jaxlm plan --config=configs/pretrain/python_docs.py --topology=v5e:4x4 --slices=2 --config.mesh.fsdp=16
    jaxlm plan --config=configs/tpu/published.py:llama3.2-1b --topology=v5e:4x4 --search --tries=8
    jaxlm plan --config=configs/tpu/published.py:llama3.1-8b --topology=v5e:2x4 --mode=serve --rows=16 --prompt=1024 \\
               --new=512 --config.mesh.fsdp=1 --config.mesh.tensor=8
    jaxlm plan --config=configs/tpu/published.py:llama3.2-1b --topology=gpu:h100x8      a100, h200, b200; or cpu:8

A TPU's topology (v4, v5e, v5p, v6e, tpu7x) needs libtpu: pip install "jaxlm[tpu]". For GPUs and CPUs that are not here
there is no compiler: of those a plan says what arithmetic can, bounds and estimates. Without a topology, the devices of
this machine. Nothing is allocated: weights and batch are shapes.

--search ranks meshes, batch sizes and what the backward pass keeps by arithmetic, and compiles the best `tries`.
--mode=serve compiles the engine's prefill and decode. --price, of a chip-hour, tells what the config's steps cost.
--json prints one object a plan.

The time is what the TPU's compiler expects of each operation (it writes estimated cycles into its program, none for
kernels), the FLOPs of attention's and experts' kernels, and what devices send each other while nothing else runs. What
goes to the hosts' memory and back (config.model.remat=offload) takes time where that is more than the work beside it.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
import numpy as np
from rich.console import Console

from jaxlm import axes, chips, hlo, log, lookup, program, step
from jaxlm import config as configs
from jaxlm.data.store import open as open_store
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.nn import pipeline
from jaxlm.nn.stack import REMAT
from jaxlm.planning import arithmetic, costs, forecast, serving
from jaxlm.planning.arithmetic import Device, held
from jaxlm.planning.forecast import Plan

SMALLER = (
    "Try a smaller config.batch, config.model.remat=full or offload, or more devices under config.mesh.fsdp; --search "
    "tries them"
)
TRIES = 12  # steps that a search compiles, unless told otherwise


class Run(NamedTuple):
    """A config's run on a mesh, as shapes."""

    parts: step.Parts
    batch: dict[str, Any]
    mesh: Mesh
    rules: dict[str, Any]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`, or stand-ins for those of `gpu:h100x8` or `cpu:8`. Raises
    `Mistake` without libtpu, or for a topology that is not known.
    """
    if topology.startswith(("gpu", "cpu")):
        if slices != 1:
            raise Mistake(f"--slices={slices} is for TPUs; GPUs of several hosts are one --topology=gpu:KINDxCOUNT")
        return arithmetic.devices(topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for the TPU machine that this is not
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices)
    except Exception as e:
        hint = "" if "libtpu" in sys.modules else '; if libtpu is missing: pip install "jaxlm[tpu]"'
        raise Mistake(f"--topology={topology}: {str(e).splitlines()[0]}{hint}") from e


def assemble(config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1) -> Run:
    """The parts of a run and the shapes of its batch, placed on these devices."""
    step.check_batch(config["batch"], config.get("accumulate", 1))
    mesh = lookup.spend("config.mesh", axes.mesh, {**(config.get("mesh") or {}), "slices": slices}, devices=where)
    rules = {**axes.RULES, **(config.get("rules") or {})}
    names = ("model", "optimizer", "steps", "objective", "guard", "seed", "accumulate", "ema", "dtype")
    schedule = lookup.spend("config.pipeline", pipeline.Schedule, config.get("pipeline"))
    with axes.on(mesh, rules), pipeline.on(schedule):
        given = {n: config[n] for n in names if n in config}
        parts = step.assemble(words=words, mesh=mesh, rules=rules, length=config["length"], **given)
        pipeline.check(parts.blueprint.shapes, config["batch"] // config.get("accumulate", 1))
        names = ("tokens", "segments", *(("other_tokens", "other_segments") if parts.task.pairs else ()))
        row = {n: np.ones(parts.task.row, np.int32) for n in names}
        example, rows = parts.task.features(row, np.random.default_rng(0)), config["batch"]
        place = NamedSharding(mesh, axes.spec("B", (rows,), mesh, rules))
        batch = {n: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=place) for n, x in example.items()}
    return Run(parts, batch, mesh, rules)


def compile_step(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1
) -> tuple[step.Parts, jax.stages.Compiled]:
    """The parts of a run and its train step, compiled for these devices by the real compiler."""
    run = assemble(config, where, words=words, slices=slices)
    return run.parts, _lower(run).compile()


def _lower(run: Run) -> jax.stages.Lowered:
    with axes.on(run.mesh, run.rules):
        return run.parts.update.lower(run.parts.shapes, run.batch)


def make(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1, price: float = 0.0
) -> Plan:  # fmt: skip
    """Compile and weigh the train step, or weigh it by arithmetic where the devices are stand-ins; `price` is of a
    chip-hour. Raises `Mistake` when a compiled step does not fit, with the compiler's figures.
    """
    begun = time.perf_counter()
    run = assemble(config, where, words=words, slices=slices)
    if isinstance(where[0], Device):
        return _counted(config, where, run, arithmetic.kept(run.parts, run.batch, run.mesh, run.rules), price)
    compiled = costs.build(_lower(run), SMALLER)
    took, chip = time.perf_counter() - begun, chips.of(where[0].device_kind)
    temporary, peak = costs.memory(compiled, where[0].platform, chip.hbm if chip else math.inf)
    operations = hlo.read(compiled.as_text() or "")
    known: dict[str, Any] = _known(config, where, run) | dict(
        compiled=True, temporary_bytes=temporary, peak_bytes=peak, compile_seconds=took,
        estimated_cycles=round(sum(op.times * op.cycles for op in operations)),
    )  # fmt: skip
    if not chip or not chip.clock:
        return Plan(**known)
    cost = costs.Cost(operations, run.mesh, chip, costs.torus(where), slices)
    return Plan(
        **known, **_paced(config, where, known, cost.step, price), step_seconds=cost.step, compute_seconds=cost.compute,
        attention_seconds=cost.attention, expert_seconds=cost.experts, exposed_seconds=cost.exposed,
        uncounted=cost.uncounted, operations=cost.dearest(10), collectives=cost.sent(), host_bytes=cost.moved,
        host_seconds=cost.hosted,
        mfu=known["flops_per_step"] / run.mesh.size / cost.step / chip.flops,
    )  # fmt: skip


def _counted(config: Mapping[str, Any], where: list[Any], run: Run, row: float, price: float) -> Plan:
    """The plan by arithmetic, where the backward pass is left `row` bytes a row of the batch."""
    known = _known(config, where, run)
    parts = config.get("accumulate", 1)
    gradients = known["parameter_bytes"] * (1 if parts == 1 else 2)
    room = arithmetic.at_the_head(run.parts, config["batch"] // parts, config["length"], run.mesh, run.rules)
    temporary = round(gradients + room + row * config["batch"] / parts / run.mesh.size)
    sends = arithmetic.sends(run.parts, config, where, run.mesh)
    bound = known["roofline_seconds"]
    return Plan(
        **known, **(_paced(config, where, known, bound, price) if bound else {}), compiled=False,
        temporary_bytes=temporary, collectives=sends,
        peak_bytes=known["parameter_bytes"] + known["optimizer_bytes"] + known["batch_bytes"] + temporary,
        sending_seconds=sum(row["seconds"] for row in sends) if bound else None,
    )  # fmt: skip


def _known(config: Mapping[str, Any], where: list[Any], run: Run) -> dict[str, Any]:
    """What is told of a run by its shapes, its places and the makers of its devices."""
    parts, mesh, chip = run.parts, run.mesh, chips.of(where[0].device_kind)
    flops = parts.blueprint.flops_per_token(config["length"])
    tokens = config["batch"] * config["length"]
    least = arithmetic.least_flops(parts.blueprint, config["length"]) * tokens
    params = held(parts.shapes["params"])
    rest = held({n: x for n, x in parts.shapes.items() if n != "params"})
    row = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in run.batch.values())
    return dict(
        model=parts.blueprint.name, devices=mesh.size, hosts=arithmetic.hosts(where), kind=where[0].device_kind,
        mesh=dict(mesh.shape), batch=config["batch"], length=config["length"],
        remat=getattr(parts.blueprint.config, "remat", "none"), parameters=parts.blueprint.size,
        parameter_bytes=params, optimizer_bytes=rest, batch_bytes=held(run.batch), hbm_bytes=chip and chip.hbm,
        flops_per_token=flops, flops_per_step=flops * tokens,
        input_bytes_per_step=row * arithmetic.host_rows(config["batch"], mesh, run.rules),
        roofline_seconds=chip and max(least / mesh.size / chip.flops, 2 * (params + rest) / chip.read),
    )  # fmt: skip


def _paced(
    config: Mapping[str, Any], where: list[Any], known: Mapping[str, Any], seconds: float, price: float
) -> dict[str, Any]:
    """What follows from the time of a step."""
    hours = seconds * config["steps"] / 3_600
    return dict(
        tokens_per_second_per_device=config["batch"] * config["length"] / known["devices"] / seconds,
        days=hours / 24, dollars=hours * costs.count_chips(where) * price or None,
        input_bytes_per_second=known["input_bytes_per_step"] / seconds,
    )  # fmt: skip


class Candidate(NamedTuple):
    """A run that a search may compile, with what arithmetic says of it."""

    name: str
    split: tuple[int, int, str]  # fsdp, tensor, remat
    config: dict[str, Any]
    bytes: float  # a device needs, about
    seconds: float  # a token of a device takes, about


def candidates(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1
) -> list[Candidate]:  # fmt: skip
    """The config on other meshes, by other remat policies and with half and double the batch, most promising first.
    Without `offload`: arithmetic counts nothing of what it sends to the hosts, and so it would always seem to be best.
    """
    kept = {name: n for name, n in (config.get("mesh") or {}).items() if name in ("stage", "expert", "sequence")}
    count, chip = len(where) // slices // math.prod(kept.values()), chips.of(where[0].device_kind)
    splits = [(f, t) for t in (1, 2, 4, 8) for f in _divisors(count // t) if count % t == 0 and f * t * 8 >= count]
    found, left = [], {}  # what the forward pass leaves to the backward pass, by remat: the same on every mesh
    for (fsdp, tensor), remat in itertools.product(splits, [name for name in REMAT if name != "offload"]):
        changed = {
            **config,
            "mesh": dict(data=-1, fsdp=fsdp, tensor=tensor, **kept),
            "model": {**config["model"], "remat": remat},
        }
        least = len(where) // tensor // kept.get("sequence", 1) * config.get("accumulate", 1)
        batches = [n for n in (config["batch"] // 2, config["batch"], 2 * config["batch"]) if n and n % least == 0]
        if not batches:
            continue
        run = assemble({**changed, "batch": batches[0]}, where, words=words, slices=slices)
        if remat not in left:
            left[remat] = arithmetic.kept(run.parts, run.batch, run.mesh, run.rules)
        for batch in batches:
            tried, name = {**changed, "batch": batch}, f"fsdp {fsdp}, tensor {tensor}, remat {remat}, batch {batch}"
            counted = _counted(tried, where, _with_rows(run, batch), left[remat], 0.0)
            seconds = arithmetic.about(counted, chip) / batch if chip else float(counted.peak_bytes)
            found.append(Candidate(name, (fsdp, tensor, remat), tried, counted.peak_bytes, seconds))
    return sorted(found, key=lambda one: one.seconds)


def _with_rows(run: Run, rows: int) -> Run:
    """The same with so many rows in a batch."""
    resized = lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)  # noqa: E731
    return run._replace(batch={name: resized(x) for name, x in run.batch.items()})


def search(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1, price: float = 0.0,
    tries: int = TRIES,
) -> Iterator[Plan | str]:  # fmt: skip
    """Plans of the `tries` candidates that arithmetic finds fastest and that it does not find too large, and on the way
    what is being done. A larger batch than one that does not fit is not tried.
    """
    yield "Counting what each mesh, remat policy and batch would need"
    found = candidates(config, where, words=words, slices=slices)
    chip = chips.of(where[0].device_kind)
    fit = [one for one in found if not chip or one.bytes <= chip.hbm]
    most = min(tries, len(fit))
    yield f"{len(found)} candidates, {len(found) - len(fit)} too large by arithmetic; at most {most} are tried"
    failed: dict[tuple[int, int, str], int] = {}
    done, begun = 0, time.perf_counter()
    for one in fit:
        if one.config["batch"] >= failed.get(one.split, sys.maxsize):
            continue
        done += 1
        try:
            plan = make(one.config, where, words=words, slices=slices, price=price)
            bound = "" if plan.compiled else "at most "
            said = f"fits, {bound}{plan.tokens_per_second_per_device or 0:,.0f} tokens/s a device"
            yield plan
        except Mistake as mistake:
            failed[one.split] = one.config["batch"]
            said = str(mistake).partition(". Try")[0]
        yield f"{done} of {most}, {time.perf_counter() - begun:.0f} s: {one.name}: {said}"
        if done == tries:
            return


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _words(config: Mapping[str, Any]) -> Words:
    """The tokenizer of the config's store; before there is one, a stand-in of the size that it will have."""
    size = ((config.get("prepare") or {}).get("tokenizer") or {}).get("vocab")
    if size is not None and not epath.Path(config["store"]).exists():
        return Words.of_size(size)
    return Words.of(open_store(config["store"]).tokenizer())


def main(argv: list[str]) -> None:
    """Read the command line, compile or count, print what a device holds and what a step takes."""
    own: dict[str, Any] = dict(mode="train", rows=16, prompt=512, new=512, tries=TRIES)
    args = configs.parse(
        __doc__ or "", argv, workdir=None, topology="", slices=int, price=0.0, search=False, json=False, **own
    )
    lookup.key("--mode", args.mode, dict.fromkeys(("train", "serve")))
    lookup.within("--", 1, rows=args.rows, prompt=args.prompt, new=args.new, tries=args.tries)
    lookup.within("--", 0, price=args.price)
    if not args.search:
        log.setup()  # what does not divide over the mesh, and so is not split
    config, console = args.config.to_dict(), Console()
    slices = (config.get("mesh") or {}).get("slices", 1) if args.slices is None else args.slices
    lookup.within("--", 1, slices=slices)
    words = _words(config)
    if args.topology:
        jax.config.update("jax_platforms", "cpu")  # those that the program is for are not here
    where = devices(args.topology, slices) if args.topology else jax.devices()
    if args.mode == "serve":
        if args.search:
            raise Mistake("--search is for --mode=train")
        plans: list[Any] = [
            serving.make(config, where, words=words, rows=args.rows, prompt=args.prompt, new=args.new, slices=slices)
        ]
    elif not args.search:
        plans = [make(config, where, words=words, slices=slices, price=args.price)]
    else:
        found = search(config, where, words=words, slices=slices, price=args.price, tries=args.tries)
        plans = []
        for told in found:
            if isinstance(told, str):
                console.print(told, highlight=False)
            else:
                plans.append(told)
        if not plans:
            raise Mistake("nothing that was tried fits")
        if plans[0].compiled:  # else they come in the order that arithmetic puts them in
            plans.sort(key=lambda plan: -(plan.tokens_per_second_per_device or 0.0))
    if args.json:
        for plan in plans:
            print(json.dumps(dataclasses.asdict(plan)))
    elif args.search:
        forecast.ranking(plans, console)
    else:
        forecast.show(plans[0], console)


if __name__ == "__main__":
    program.run("plan", main)
