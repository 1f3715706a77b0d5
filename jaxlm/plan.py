"""Compile a config's train step for devices that are not here: does it fit, and what does it hold?

    jaxlm plan --config=configs/pretrain/python_docs.py --topology=v5e:4x4 --slices=2 --config.mesh.fsdp=16

The topology is a TPU's (v4, v5e, v5p, v6e, ...) and needs libtpu: pip install "jaxlm[tpu]". Without one, the devices of
this machine. Nothing is allocated: weights and batch are shapes.
"""

from collections.abc import Mapping
import os
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlm import axes, lookup, program, step
from jaxlm import config as configs
from jaxlm.data.store import open as open_store
from jaxlm.data.words import Words
from jaxlm.lookup import Mistake


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`. Raises `Mistake` without libtpu, or for a topology it does not
    know.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for the TPU machine that this is not
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices)
    except Exception as e:
        hint = "" if "libtpu" in sys.modules else '; if libtpu is missing: pip install "jaxlm[tpu]"'
        raise Mistake(f"--topology={topology}: {str(e).splitlines()[0]}{hint}") from e


def compile_step(
    config: Mapping[str, Any], where: list[Any], *, words: Words, slices: int = 1
) -> tuple[step.Parts, jax.stages.Compiled]:
    """The parts of a run and its train step, compiled for these devices by the real compiler."""
    mesh = lookup.spend("config.mesh", axes.mesh, {**config.get("mesh", {}), "slices": slices}, devices=where)
    rules = {**axes.RULES, **config.get("rules", {})}
    names = ("model", "optimizer", "steps", "objective", "guard", "seed", "accumulate", "ema", "dtype")
    with axes.on(mesh, rules):
        given = {n: config[n] for n in names if n in config}
        parts = step.assemble(words=words, mesh=mesh, rules=rules, length=config["length"], **given)
        names = ("tokens", "segments", *(("other_tokens", "other_segments") if parts.task.pairs else ()))
        row = {n: np.ones(parts.task.row, np.int32) for n in names}
        example, rows = parts.task.features(row, np.random.default_rng(0)), config["batch"]
        place = NamedSharding(mesh, axes.spec("B", (rows,), mesh, rules))
        batch = {n: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=place) for n, x in example.items()}
        return parts, parts.update.lower(parts.shapes, batch).compile()


def main(argv: list[str]) -> None:
    """Read the command line, compile, print what a device holds."""
    args = configs.parse(__doc__ or "", argv, workdir=None, topology="", slices=1)
    config = args.config.to_dict()
    model = config.get("model", {})
    known = "vocab" not in model
    words = Words.of(open_store(config["store"]).tokenizer()) if known else Words.of_size(model["vocab"])
    where = devices(args.topology, args.slices) if args.topology else jax.devices()
    begun = time.perf_counter()
    parts, compiled = compile_step(config, where, words=words, slices=args.slices)
    memory, took = compiled.memory_analysis(), time.perf_counter() - begun
    if memory is None:
        raise Mistake(f"{where[0].device_kind}: this compiler tells nothing about memory")
    table = Table(title=f"{parts.blueprint.name} on {len(where)} x {where[0].device_kind}", show_header=False)
    flops = parts.blueprint.flops_per_token(config["length"])
    for label, text in {
        "parameters": f"{parts.blueprint.size:,}",
        "model FLOPs per step": f"{flops * config['batch'] * config['length']:.3g}",
        "arguments per device": f"{memory.argument_size_in_bytes / 1e9:.3f} GB",
        "temporaries per device": f"{memory.temp_size_in_bytes / 1e9:.3f} GB",
        "compiled in": f"{took:.1f} s",
    }.items():
        table.add_row(label, text)
    Console().print(table)


if __name__ == "__main__":
    program.run("plan", main)
