"""Train a model: the same command starts, resumes and finishes a run.

    jaxlm train --config=configs/quickstart.py --workdir=runs/quickstart
    jaxlm train --config=configs/quickstart.py:tiny --workdir=/tmp/try --config.optimizer.lr=3e-4

On several hosts, run it on each; the hosts find each other on Cloud TPU by --config.distributed=True, and elsewhere by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Read `train` from top to bottom; the gradient is in
`jaxlm.step`.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

from jaxlm import axes, hosts, lookup, objectives, program, resume
from jaxlm import config as configs
from jaxlm import step as steps_
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import rows, vectors
from jaxlm.data.store import Store
from jaxlm.data.store import open as open_store
from jaxlm.data.tokenizers import Named
from jaxlm.data.words import Words
from jaxlm.evals import held_out as evals
from jaxlm.lm import LM
from jaxlm.log import Log, lines, setup
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint
from jaxlm.nn import pipeline as stages
from jaxlm.objectives import Objective
from jaxlm.samples import Samples, on_one

Section = Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Every:
    """After how many steps to log, evaluate and save (0: only at the end, where all three happen anyway)."""

    log: int = 10
    eval: int = 0
    save: int = 0

    def __post_init__(self):
        lookup.within("config.every.", 0, **dataclasses.asdict(self))


def train(
    workdir: str, *, store: str, model: Section, optimizer: Section, steps: int, batch: int, length: int, seed: int = 0,
    objective: Section = None, data: Section = None, accumulate: int = 1, ema: float = 0.0, dtype: str = "auto",
    mesh: Section = None, pipeline: Section = None, rules: Section = None, guard: Section = None,
    every: Section = None, evaluation: Section = None, checkpoint: Section = None, samples: Section = None,
    prepare: Section = None, init: Section = None,
) -> dict[str, float]:  # fmt: skip
    """Train to `steps` and return the last evaluation. The arguments are the config's keys; README explains each
    (`prepare` says how the store was made: it is kept in the workdir's config.json, and not read here).

    Raises `Mistake` before the first step for whatever the user can mend, and when too many steps in a row are skipped.
    """
    settings = {name: value for name, value in locals().items() if name != "workdir"}
    tokens = open_store(store)
    _same_sources(tokens, prepare, data)
    grid = lookup.spend("config.mesh", axes.mesh, mesh)
    rules = {**axes.RULES, **(rules or {})}
    schedule = lookup.spend("config.pipeline", stages.Schedule, pipeline)
    when = lookup.spend("config.every", Every, every)
    steps_.check_batch(batch, accumulate)

    with axes.on(grid, rules), stages.on(schedule), Stop() as stop:
        blueprint, task, tx, rate, limits, update, shapes = steps_.assemble(
            model=model, optimizer=optimizer, objective=objective, guard=guard, steps=steps, length=length,
            words=Words.of(tokens.tokenizer()), mesh=grid, rules=rules, seed=seed, accumulate=accumulate, ema=ema,
            dtype=dtype,
        )  # fmt: skip
        stages.check(blueprint.shapes, batch // accumulate)
        named, both_ways = Named(tokens.tokenizer()), objectives.both_ways(objective)
        wanted = lookup.spend("config.samples", Samples, samples) if samples else None
        if wanted:
            wanted.check(LM(blueprint, shapes["params"], named))
        stream, features = lookup.spend(
            "config.data", _stream, data, tokens, task, seed=seed, batch=batch, until=steps * batch
        )
        held_out = lookup.spend("config.evaluation", _held_out, evaluation, tokens, task)
        measure = jax.jit(lambda params, batch: task.loss(blueprint.bind(params), batch))

        def evaluate(step: int) -> dict[str, float]:
            params = state["ema" if ema else "params"]
            total = {}
            for name, documents in held_out.items():
                found = _measure(measure, params, documents, task, batch, grid, rules, stop)
                if stop.asked:  # cut short: a part of the documents is no result, to log or to rank checkpoints by
                    return {}
                log.evaluation(step, name, found)
                total |= {f"{name}/{key}": value for key, value in found.items()}
            means = [key.partition("/")[2] for key in total]
            return total | {
                key: float(np.mean([v for k, v in total.items() if k.endswith("/" + key)])) for key in means
            }

        checkpoints = lookup.spend("config.checkpoint", Checkpoints, checkpoint, workdir)
        _check_metric(checkpoints.metric, measure, shapes["params"], held_out, task)
        resume.check(workdir, settings, checkpoints.steps(), tokens, blueprint.shapes)
        restored = checkpoints.restore(shapes)
        start = restored[0] if restored else 0
        if start > steps:
            raise Mistake(f"{workdir} is at step {start} already, past config.steps={steps}")
        given = None  # embeddings to begin with, for a run that begins
        if init and not restored:
            width = blueprint.shapes["embed_VD"].shape[1]
            given = lookup.spend("config.init", vectors.embeddings, init, tokens.tokenizer(), width)
        log = Log(workdir, start_step=start, steps=steps, flops_per_token=blueprint.flops_per_token(length))
        with checkpoints, log:
            if log.writes:  # not before all has been checked: a mistake must not overwrite a good run's config
                configs.write(settings, workdir)
                tokens.tokenizer().save(epath.Path(workdir) / "tokenizer")
            if restored:
                state = restored[1]
                checkpoints.set_aside(start)
                log.say(f"going on after step {start} of {steps}")
            else:
                params = blueprint.init(seed, grid, rules)
                params = steps_.embedded(params, *given) if given else params
                places = jax.tree.map(lambda x: x.sharding, shapes)
                state = jax.jit(functools.partial(steps_.init, tx, ema=ema), out_shardings=places)(params)
                log.say(
                    f"{blueprint.name}: {blueprint.size:,} parameters, {blueprint.config.dtype}, on {dict(grid.shape)}"
                )
                if given:
                    log.say(f"{len(given[0]):,} of {tokens.vocab:,} tokens begin with a text vector")
            local, noise = axes.local_rows(batch, grid, rules), None if task.exact else seed
            batches = rows.batches(stream, batch=batch, start_step=start, rows=local, features=features, seed=noise)
            metrics, found = {}, {}
            for step in range(start + 1, steps + 1):
                asked = time.monotonic()
                host_batch = next(batches)
                waited = time.monotonic() - asked
                _check(host_batch, blueprint.config.vocab, first=step == start + 1)
                placed = axes.put(host_batch, batch, grid, rules)
                log.waited(waited, time.monotonic() - asked)
                before, (state, metrics) = metrics, update(state, placed)
                if before:  # of the step before, so that the device is never idle while the host looks
                    _note(log, before, step - 1, limits.patience)
                last = step == steps
                stopping = stop(step)
                if (when.log and step % when.log == 0) or last or stopping:
                    _note(log, metrics, step, limits.patience)
                    numbers = {key: float(value) for key, value in metrics.items()}
                    log.train(step, numbers | {"lr": float(rate(step - 1))})
                    metrics = {}
                if ((when.eval and step % when.eval == 0) or last) and not stopping:
                    found = evaluate(step)
                    stopping = stop.asked  # not a step later: the grace period runs
                    log.pause()
                if (when.save and step % when.save == 0) or last or stopping:
                    log.sync()
                    steps_.check_params(state["params"], step)
                    checkpoints.save(step, state, found if step % (when.eval or steps) == 0 or last else None)
                    log.pause()
                if stopping:
                    checkpoints.wait()
                    log.say(f"stopped by a signal; saved at step {step}. The same command goes on from there")
                    return found
            checkpoints.wait()
            found = found or evaluate(steps)
            if wanted and log.writes and jax.process_count() == 1:
                params, one = on_one(state["ema" if ema else "params"])
                with axes.on(one or grid, rules):
                    wanted.write(LM(blueprint, params, named, both_ways=both_ways), workdir, steps)
        if log.writes:
            _summarise(workdir, blueprint, found)
        return found


def _same_sources(store: Store, prepare: Section, data: Section) -> None:
    """Raise `Mistake` where a store has other sources than those that the config has it made of, and no weights say
    which to train on; a store that shares none with the config was chosen on purpose.
    """
    named, held = set((prepare or {}).get("sources") or ()), set(store.sources)
    if named & held and named != held and not (data or {}).get("weights"):
        raise Mistake(
            f"the store {store.path} holds the sources {', '.join(sorted(held))}, and config.prepare.sources names "
            f"{', '.join(sorted(named))}: run `jaxlm prepare`, remove the folder of one that is not wanted, or say "
            "in config.data.weights what to train on"
        )


def _check_metric(
    metric: str, measure: Callable, params: Any, held_out: Mapping[str, rows.Rows], task: Objective
) -> None:
    """Raise `Mistake` for a metric to rank checkpoints by that no evaluation tells, as it does "loss", "docs/loss"."""
    tells = {"loss", "perplexity", "accuracy"} | ({"bits_per_byte"} if task.exact else set())
    by_source = lambda names: names | {f"{source}/{name}" for source in held_out for name in names}  # noqa: E731
    if held_out and metric not in by_source(tells):
        some = rows.batches(next(iter(held_out.values())), batch=1, features=task.features, seed=0, threads=0)
        tells |= set(jax.eval_shape(measure, params, next(iter(some))).others)
        lookup.key("config.checkpoint.metric", metric, dict.fromkeys(by_source(tells)))


class Stop:
    """Whether a signal asks the run to stop, as a context: SIGTERM, or on several hosts JAX's notice of preemption."""

    def __enter__(self) -> "Stop":
        self.asked, self._many = False, jax.process_count() > 1
        if not self._many:
            self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._many:
            signal.signal(signal.SIGTERM, self._before)

    def __call__(self, step: int) -> bool:
        if self._many:  # all hosts must stop after the same step
            self.asked = self.asked or multihost_utils.reached_preemption_sync_point(step)
        return self.asked


def _stream(
    store: Store,
    task: Objective,
    *,
    seed: int,
    batch: int,
    until: int,
    packing: str = "best_fit",
    isolate: bool = True,
    weights: Section = None,
    temperature: float | None = None,
    cap: float | None = None,
    epochs: Any = None,
    schedule: Any = None,
) -> tuple[Any, Callable]:
    """The endless stream of training rows, and what turns a row into an example.

    How the sources are mixed is said by `weights` and the options below it (`jaxlm.data.mixing.plan`; `cap` in tokens).
    With `isolate=False` documents of a row see each other, and a causal model need not know where one ends.
    """
    stream = rows.train(
        store, length=task.row, seed=seed, packing=packing, isolate=isolate, pairs=task.pairs, cost=task.cost,
        batch=batch, until=until, weights=weights, temperature=temperature, epochs=epochs, schedule=schedule,
        cap=cap / task.row if isinstance(cap, int | float) else cap,
    )  # fmt: skip
    if isolate or not task.exact:
        return stream, task.features
    return stream, lambda row, rng: {k: x for k, x in task.features(row, rng).items() if k != "segments"}


def examples(
    store: Store, *, model: Section, steps: int, batch: int, length: int, seed: int = 0, objective: Section = None,
    data: Section = None,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """The training examples of a config one by one, in their order and with their noise, without the model."""
    words = Words.of(store.tokenizer())
    kind = Blueprint.of(model or {}, vocab=words.vocab).kind
    task = objectives.of(objective, length=length, words=words, kind=kind)
    more = dict(seed=seed, batch=batch, until=steps * batch)
    stream, features = lookup.spend("config.data", _stream, data, store, task, **more)
    noise = None if task.exact else seed
    for one in rows.batches(stream, batch=1, features=features, seed=noise, threads=0):
        yield {name: values[0] for name, values in one.items()}


def _held_out(
    store: Store, task: Objective, *, documents: int | None = None, sources: list[str] | None = None
) -> dict[str, rows.Rows]:
    """The validation rows of each source that has any; `documents` bounds how many of each."""
    lookup.within("config.evaluation.", 1, documents=1 if documents is None else documents)
    named = [s for s in store.sources if len(store.split(s, "validation"))] if sources is None else sources
    return {
        source: rows.validation(store, source, length=task.row, documents=documents, pairs=task.pairs, cost=task.cost)
        for source in named
    }


def _measure(
    measure: Callable,
    params: Any,
    held_out: rows.Rows,
    task: Objective,
    batch: int,
    grid: Any,
    rules: Mapping,
    stop: Stop,
) -> dict[str, float]:
    """Loss (nats per token), perplexity and accuracy over whole held-out documents, with the same noise every time.

    Where the objective is exact, the bits per UTF-8 byte too.
    """
    local, seed = axes.local_rows(batch, grid, rules), None if task.exact else 0

    def batches() -> Iterator[Mapping[str, Any]]:
        for host_batch in rows.batches(held_out, batch=batch, rows=local, features=task.features, seed=seed):
            yield axes.put(host_batch, batch, grid, rules)
            if stop.asked:
                return

    found = evals.measure(functools.partial(measure, params), batches())
    nats, count = found.pop("nats"), found.pop("tokens")
    if task.exact:
        if not stop.asked and round(count) != held_out.plan.predicted:
            raise RuntimeError(f"evaluation scored {count:.0f} tokens of {held_out.plan.predicted}")
        found["bits_per_byte"] = nats / math.log(2) / max(held_out.bytes or 0, 1)
    return found


def _check(batch: Mapping[str, np.ndarray], vocab: int, *, first: bool) -> None:
    """Raise `Mistake` for ids that the model does not know, or a first batch in which nothing is to be predicted."""
    for name in {"tokens", "decoder_tokens", "labels"} & batch.keys():
        low, high = int(batch[name].min()), int(batch[name].max())
        if low < 0 or high >= vocab:
            raise Mistake(f"batch: {name} go from {low} to {high}, but the model's vocabulary has {vocab} entries")
    if first and not batch["weights"].any() and jax.process_count() == 1:
        raise Mistake(
            "batch: every weight of the first batch is 0, so there is nothing to learn; look at the data and objective"
        )


def _note(log: Log, metrics: Mapping[str, jax.Array], step: int, patience: int) -> None:
    """Count a finished step; raises `Mistake` when it is the last of too many that were skipped in a row."""
    log.tick(step, int(metrics["tokens"]))
    in_row = int(metrics["in_row"])
    if in_row >= patience:
        raise Mistake(
            f"step {step}: {in_row} steps in a row were skipped, their loss or gradient not finite or exploding. "
            "What was saved before is intact; try a lower config.optimizer.lr, a longer warmup, or clip"
        )


def _summarise(workdir: str, blueprint: Blueprint, found: Mapping[str, float]) -> None:
    """Leave summary.json and report.html in the workdir."""
    from jaxlm import report  # it draws with matplotlib, which takes a second to import: not before the first step

    path = epath.Path(workdir) / "summary.json"
    summary = report.read_object(path)
    logged = [line for line in lines(workdir) if "tokens_per_s" in line]
    speeds = sorted(line["tokens_per_s"] for line in logged)
    summary |= {f"validation_{key}": value for key, value in found.items() if "/" not in key}
    summary |= {"train_seconds": max((line["time"] for line in logged), default=0.0), "parameters": blueprint.size}
    summary |= {"tokens_per_second": speeds[len(speeds) // 2]} if speeds else {}
    path.write_text(json.dumps(summary, indent=1) + "\n")
    report.write(workdir)


def _take_cores(keys: Mapping[str, Any]) -> None:
    """Have JAX take a CPU for as many devices as `step.abreast` says, unless it was told already, or has begun. What
    keys are missing is left to `train` to say.
    """
    told = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform" in os.environ.get("XLA_FLAGS", "")
    if told or not {"model", "batch", "length"} <= keys.keys() or not isinstance(keys.get("store"), str):
        return
    wanted = {name: keys[name] for name in lookup.keywords(steps_.abreast) & keys.keys()}
    devices = lookup.spend("config", steps_.abreast, wanted, vocab=open_store(keys["store"]).vocab)
    with contextlib.suppress(RuntimeError):  # of a process whose devices are there already
        jax.config.update("jax_num_cpu_devices", devices)


def main(argv: list[str]) -> None:
    """Read the command line, prepare the workdir, train."""
    args = configs.parse(__doc__ or "", argv)
    setup()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a CPU's thread waits where it could compute
    settings: ConfigDict = args.config
    keys = {name: value for name, value in settings.to_dict().items() if name != "distributed"}
    meet = bool(settings.get("distributed"))
    if not meet and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        _take_cores(keys)
    with hosts.Together(args.workdir, meet=meet):
        workdir = epath.Path(args.workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (workdir / "command").write_text(shlex.join(["jaxlm", "train", *argv]) + "\n")
        lookup.spend("config", train, keys, args.workdir)


if __name__ == "__main__":
    program.run("train", main)
