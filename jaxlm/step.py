"""The training step: a pure function of (state, batch), and the state it works on.

    state = {params, opt, ema?, progress: {step, skipped, in_row, seen, norm}}       plain trees of arrays

A step that `Guard` refuses changes nothing but the counts in `progress`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import optax

from jaxlm import axes, lookup, models, objectives, optim, program
from jaxlm.data.words import Words
from jaxlm.models import Blueprint
from jaxlm.objectives import Objective

State = dict[str, Any]
Section = Mapping[str, Any] | None

ABREAST = 4  # devices of a CPU, each of which holds the state and updates it ...
TOKENS = 512  # ... which pays for itself from about so many tokens a step on


@dataclasses.dataclass(frozen=True)
class Guard:
    """Which steps are skipped: those with a loss or gradient that is not finite, or a gradient norm of `factor` times
    its running mean (looked for once `after` steps were good). `patience` skipped steps in a row end the run. The mean
    counts a norm of more than `factor` times itself as that, so that it comes up with one that has risen to stay: a
    model that leaves a plateau is not held there, however good its gradients.
    """

    factor: float = 10.0
    after: int = 50
    patience: int = 20

    def __post_init__(self):
        lookup.within("config.guard.", 1, factor=self.factor, patience=self.patience)
        lookup.within("config.guard.", 0, after=self.after)


class Parts(NamedTuple):
    """What a run is made of, before anything is allocated."""

    blueprint: Blueprint
    task: Objective
    tx: optax.GradientTransformation
    rate: Callable  # step -> learning rate
    guard: Guard
    update: Callable  # (state, batch) -> (state, metrics), jitted, the state donated
    shapes: State  # the state's shapes, dtypes and places


def assemble(
    *,
    model: Section,
    optimizer: Section,
    steps: int,
    length: int,
    words: Words,
    mesh: Mesh,
    rules: Mapping[str, Any],
    objective: Section = None,
    guard: Section = None,
    seed: int = 0,
    accumulate: int = 1,
    ema: float = 0.0,
    dtype: str = "auto",
) -> Parts:
    """Turn the config's sections into the parts of a run on `mesh`, within `axes.on(mesh, rules)`.

    `dtype="auto"` computes in float32 on a CPU and in bfloat16 elsewhere. Raises `Mistake` for a key or value that is
    not.
    """
    lookup.within("config.", 1, 2**31 - 1, steps=steps, length=length, accumulate=accumulate)  # counted in int32
    lookup.within("config.", 0, 2**32 - 1, seed=seed)
    if not 0 <= ema < 1:
        raise lookup.Mistake(f"config.ema={ema} is the share that a step keeps: 0 (no average) or more, and below 1")
    if dtype == "auto":
        dtype = "float32" if axes.platform() == "cpu" else "bfloat16"
    blueprint = Blueprint.of(model or {}, vocab=words.vocab, dtype=dtype)
    task = objectives.of(objective, length=length, words=words, kind=blueprint.kind)
    tx, rate = lookup.spend("config.optimizer", optim.optimizer, optimizer, blueprint.shapes, steps=steps)
    limits = lookup.spend("config.guard", Guard, guard)
    apart = task.apart and models.apart(blueprint.config)
    function = make(blueprint, tx, task.loss, seed=seed, accumulate=accumulate, ema=ema, guard=limits, apart=apart)
    state = shapes(blueprint, tx, mesh, rules, ema=ema)
    places = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(function, donate_argnums=0, out_shardings=(places, None), compiler_options=_options(mesh))
    return Parts(blueprint, task, tx, rate, limits, update, state)


def abreast(
    *, model: Section, vocab: int, batch: int, length: int, objective: Section = None, optimizer: Section = None,
    accumulate: int = 1, mesh: Section = None, rules: Section = None,
) -> int:  # fmt: skip
    """For how many devices a CPU is best taken by one process: as many as it has cores, `ABREAST` at most, that divide
    the rows of a step. One where `config.mesh` or `rules` say how to split, where a row's gradient depends on the rows
    beside it, and where what each device does for all is too much: holding the state of 2**27 parameters and more,
    Muon's products, any update after fewer than `TOKENS`. Starts no device.
    """
    check_batch(batch, accumulate)
    blueprint = Blueprint.of(model or {}, vocab=vocab)
    alone = models.apart(blueprint.config) and objectives.apart(objective)
    heavy = (optimizer or {}).get("name") in optim.MULTIPLIES or blueprint.size >= 2**27 or batch * length < TOKENS
    if mesh or rules or heavy or not alone:
        return 1
    return next(n for n in range(min(program.cores(), ABREAST), 0, -1) if batch // accumulate % n == 0)


def _options(mesh: Mesh) -> dict[str, Any] | None:
    """Have a TPU gather a weight before it multiplies by it, and sum a gradient behind its product. Left alone, its
    compiler may multiply by one device's part after the other, sent around meanwhile: parts of a few columns leave most
    of a TPU idle. Where `tensor` or `sequence` splits tokens, these are what is sent, and it is left alone, as it is
    where LIBTPU_INIT_ARGS says how it is to be.
    """
    flag, split = "xla_tpu_enable_windowed_einsum_for_", mesh.shape["tensor"] * mesh.shape["sequence"] > 1
    if axes.platform() != "tpu" or split or flag in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return None
    return {flag + "all_gather": False, flag + "reduce_scatter": False}


def check_batch(batch: int, accumulate: int) -> None:
    """Raise `Mistake` for rows of a step that are none, or that do not divide in so many parts."""
    lookup.within("config.", 1, batch=batch, accumulate=accumulate)
    if batch % accumulate:
        raise lookup.Mistake(f"config.batch={batch} is no multiple of config.accumulate={accumulate}")


def check_params(params: Any, step: int) -> None:
    """Raise `Mistake` for parameters that are not finite: the guard sees losses and gradients, and an optimizer may
    make of good ones what is no number.
    """
    if not math.isfinite(_total(params)):
        raise lookup.Mistake(
            f"step {step}: parameters are not finite, though the gradients were: see config.optimizer's own options. "
            "Nothing was saved at this step; what was saved before is intact"
        )


@jax.jit
def _total(params: Any) -> jax.Array:
    return sum((x.sum() for x in jax.tree.leaves(params)), jnp.zeros(()))


def init(tx: optax.GradientTransformation, params: Any, *, ema: float) -> State:
    """The state before the first step; trace it under jit, so that each device makes only what it holds."""
    progress: State = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "in_row", "seen")}
    progress["norm"] = jnp.zeros(())
    state = dict(params=params, opt=tx.init(params), progress=progress)
    return state | {"ema": jax.tree.map(jnp.copy, params)} if ema else state


def embedded(params: Any, ids: np.ndarray, vectors: np.ndarray) -> Any:
    """The parameters with the embeddings of these tokens replaced by `vectors` [ids, D].

    One factor scales them all, so that their root mean square is that of the embeddings as the family draws them: the
    directions and relative lengths are the vectors', the size is what the family was made for.
    """

    def put(embed_VD, ids, vectors):
        size = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
        return embed_VD.at[ids].set(vectors * (size(embed_VD) / size(vectors)))

    table = params["embed_VD"]
    return {**params, "embed_VD": jax.jit(put, out_shardings=table.sharding)(table, ids, vectors)}


def shapes(blueprint: Blueprint, tx: optax.GradientTransformation, mesh: Mesh, rules: Mapping, *, ema: float) -> State:
    """The state's shapes, dtypes and places on the mesh, without allocating any of it."""
    state = jax.eval_shape(lambda params: init(tx, params, ema=ema), blueprint.shapes)
    places = axes.shardings(state, mesh, rules)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)


def make(
    blueprint: Blueprint,
    tx: optax.GradientTransformation,
    loss: Callable,
    *,
    seed: int,
    accumulate: int = 1,
    ema: float = 0.0,
    guard: Guard = Guard(),
    apart: bool = False,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    `loss(model, batch, key)` gives sums over tokens (`jaxlm.nn.loss.Sums`). The batch is cut in `accumulate` parts,
    whose gradients are summed and divided by the real tokens of the whole batch. `apart` says that the loss is a sum
    over rows, each the same whatever rows are beside it.
    """

    gradients = _gradients(blueprint, loss, accumulate, apart)

    def step(state, batch):
        progress = state["progress"]
        key = jax.random.fold_in(jax.random.key(seed), progress["step"]) if blueprint.config.dropout else None
        grads, sums = gradients(state["params"], batch, key)
        norm, mean = optax.tree.norm(grads), sums.loss / jnp.maximum(sums.weight, 1.0)
        spike = (progress["seen"] >= guard.after) & (norm > guard.factor * progress["norm"])
        finite = jnp.isfinite(norm) & jnp.isfinite(mean) & (sums.weight > 0)
        good = finite & ~spike

        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = dict(params=optax.apply_updates(state["params"], updates), opt=opt)
        if ema:
            new["ema"] = optax.incremental_update(new["params"], state["ema"], 1.0 - ema)
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # fused with the update; a cond would copy
        most = jnp.where(progress["seen"] < guard.after, norm, jnp.minimum(norm, guard.factor * progress["norm"]))
        blend = jnp.where(progress["seen"] == 0, norm, 0.98 * progress["norm"] + 0.02 * most)
        new["progress"] = dict(
            step=progress["step"] + 1,
            skipped=progress["skipped"] + ~good,
            in_row=jnp.where(good, 0, progress["in_row"] + 1),
            seen=progress["seen"] + good,
            norm=jnp.where(finite, blend, progress["norm"]),
        )
        per_token = jnp.maximum(sums.weight, 1.0)
        metrics = dict(loss=sums.nll / per_token, objective=mean, accuracy=sums.correct / per_token)
        metrics |= {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.others.items()}
        metrics |= dict(grad_norm=norm, tokens=sums.weight)
        return new, metrics | dict(skipped=new["progress"]["skipped"], in_row=new["progress"]["in_row"])

    return step


def _gradients(blueprint: Blueprint, loss: Callable, accumulate: int, apart: bool) -> Callable:
    """The function (params, batch, key) -> gradients of the mean loss of the batch's tokens, and the sums over them."""

    def over(weight, params, batch, key=None):
        def scaled(params, part, key):
            sums = loss(blueprint.bind(params), part, key)
            return sums.loss / weight, sums

        both = jax.value_and_grad(scaled, has_aux=True)
        if accumulate == 1:
            (_, sums), grads = both(params, batch, key)
            return grads, sums

        def add(total, xs):
            part, i = xs
            (_, sums), grads = both(params, part, None if key is None else jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        parts = jax.tree.map(lambda x: _interleave(x, accumulate), dict(batch))
        (_, sums), grads = jax.eval_shape(both, params, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
        return jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))[0]

    def gradients(params, batch, key):
        if apart and (summed := _over_rows(batch, accumulate)):
            sum_all = summed(lambda params, batch: (*over(1.0, params, batch), batch["weights"].sum()))
            grads, sums, weight = sum_all(params, batch)
            return jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), grads), sums
        return over(jnp.maximum(batch["weights"].sum(), 1.0), params, batch, key)

    return gradients


def _over_rows(batch: Mapping[str, jax.Array], accumulate: int) -> Callable | None:
    """Where CPUs split nothing but rows, what makes of a function (params, batch) one of which each device computes its
    own rows' part, with a single sum over all; else None.

    A CPU's devices are threads, which wait for each other at every sum: left to itself the compiler has one for each
    parameter, amid the backward pass.
    """
    place, rows = axes.here(), len(batch["tokens"])
    if place is None or axes.platform() != "cpu" or place[0].shape["data"] != place[0].size:
        return None
    mesh, split = place[0], axes.spec("B", (rows,), *place)
    if mesh.size == 1 or split != PartitionSpec("data") or rows // mesh.size % accumulate:
        return None
    whole = PartitionSpec()
    return lambda function: jax.shard_map(
        lambda *args: jax.lax.psum(function(*args), "data"),
        in_specs=(whole, split), out_specs=whole, axis_names=axes.free(), check_vma=False,
    )  # fmt: skip


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], row i to part i mod parts, so that each part lies on the devices as the
    whole did.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
