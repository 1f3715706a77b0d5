"""Layers on several stages: each of `config.mesh.stage` has a part of the layers, and rows go from one to the next.

Rows are cut in microbatches, and a group of as many as there are stages goes round together, `repeats` times; a stage
holds that many chunks of layers, and all are at work but for `stages - 1` turns at the beginning and the end. A group
behind another waits for nothing: two stages, two repeats, microbatches a b | c d, and the chunk that each meets:

    turn       0    1    2    3    4    5    6    7    8
    stage 0    a0   b0   a2   b2   c0   d0   c2   d2
    stage 1         a1   b1   a3   b3   c1   d1   c3   d3

Outside, all stages have rows of their own (the rule of B), so embeddings and the loss are computed once. Microbatches
come to stage 0 and go back home along the stages, a place a turn, so that whatever is sent goes to a neighbour, and no
device ever holds the rows of another. What layers read of the same rows (segments, an encoder's states) goes with them.
Read `run` first, `Schedule` second.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from jaxlm import axes, lookup
from jaxlm.lookup import Mistake

AXIS = "stage"
ENOUGH = 4  # microbatches a stage: of five turns, the ends then take less than one


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How stages work on a batch: in how many microbatches (up to four a stage unless given), and how often each goes
    round: more rounds shorten the idle ends, and send each layer once a step to the stage that it is for.
    """

    microbatches: int | None = None
    repeats: int = 1

    def __post_init__(self):
        lookup.within("config.pipeline.", 1, repeats=self.repeats, microbatches=self.microbatches or 1)

    def parts(self, rows: int) -> int:
        """How many microbatches; raises `Mistake` where they cannot be, or the rows do not divide over the stages."""
        over = axes.splitting("B", "B", (rows,))
        stages, each = axes.ways((AXIS,)), rows // axes.ways(over)
        if AXIS not in over:
            raise Mistake(f"{rows} rows at a time (config.batch) do not divide over config.mesh.stage={stages}")
        choices = [stages * n for n in range(1, each + 1) if each % n == 0]
        if self.microbatches is None:
            return max(n for n in choices if n <= ENOUGH * stages)
        if self.microbatches not in choices:
            some = ", ".join(map(str, choices))
            raise Mistake(
                f"config.pipeline.microbatches={self.microbatches}: {rows} rows on {' x '.join(over)} go into {some}"
            )
        return self.microbatches

    def chunk(self, layers: int, name: str) -> int:
        """How many layers stand together; raises `Mistake` where they do not divide."""
        stages = axes.ways((AXIS,))
        if layers % (stages * self.repeats):
            fit = ", ".join(str(n) for n in range(1, layers + 1) if layers % (stages * n) == 0)
            raise Mistake(
                f"config.pipeline.repeats={self.repeats} x config.mesh.stage={stages} does not divide the {layers} "
                f"layers of {name}; repeats that do: {fit}"
            )
        return layers // (stages * self.repeats)


USUAL = Schedule()
_schedule: contextvars.ContextVar[Schedule] = contextvars.ContextVar("schedule", default=USUAL)


@contextlib.contextmanager
def on(schedule: Schedule) -> Iterator[None]:
    """Within this block, layers that are split over stages run by this schedule."""
    token = _schedule.set(schedule)
    try:
        yield
    finally:
        _schedule.reset(token)


def check(params: Any, rows: int) -> None:
    """Raise `Mistake` where the layers of these parameters, or so many rows, do not fit the mesh of the enclosing
    `axes.on` and the schedule.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if len(x.shape) > len(axes.of(axes.name_of(path)) or x.shape) and split(x.shape[0]):
            _schedule.get().chunk(x.shape[0], jax.tree_util.keystr(path[:1], simple=True))
            _schedule.get().parts(rows)


def split(layers: int, rows: int | None = None) -> bool:
    """Whether so many layers, and rows, lie on several stages; never within a stage."""
    return AXIS in axes.splitting("L", "L", (layers,)) and (rows is None or AXIS in axes.splitting("B", "B", (rows,)))


def run(
    through: Callable[..., Any], layer: Callable[..., Any], carry: Any, rows: Any, params: Any, per_layer: Any,
    kinds: Sequence[Any], *, kept: bool,
) -> Any:  # fmt: skip
    """Lead the carry through all layers, a chunk a stage: arrays [B, ...], as `rows` are, which each layer reads.

    `through(layer, carry, (params, per_layer), kinds)` runs the layers of a chunk, `layer(carry, rows, (params, extra),
    kind)` is one of them. Keys in `per_layer` become others for each microbatch. Raises `Mistake` where chunks are not
    alike, and for several repeats where the backward pass keeps all of a layer (`kept`), so its weights for each turn.
    """
    schedule, stages = _schedule.get(), axes.ways((AXIS,))
    repeats, layers = schedule.repeats, len(kinds)
    chunk, parts = schedule.chunk(layers, "the model"), schedule.parts(len(jax.tree.leaves(carry)[0]))
    around = stages * repeats  # turns that a group takes
    if list(kinds) != list(kinds[:chunk]) * around:
        raise Mistake(
            f"config.mesh.stage={stages} x config.pipeline.repeats={repeats}: each has {chunk} of {layers} layers, "
            "which must be of the same kinds in the same order, and these are not"
        )
    if kept and repeats > 1:
        raise Mistake(f"config.pipeline.repeats={repeats} needs config.model.remat: full or dots, not none")

    def program(params: Any, carry: Any, rows: Any, per_layer: Any) -> Any:
        me = jax.lax.axis_index(AXIS)
        params = jax.tree.map(lambda x: _dealt(x, stages, repeats, me), params)
        mine = lambda x: _at(x.reshape(repeats, stages, chunk, *x.shape[1:]), me, 1).swapaxes(0, 1)  # noqa: E731
        per_layer = jax.tree.map(mine, per_layer)
        cut = lambda x: x.reshape(-1, parts // stages, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        given = jax.tree.map(cut, (carry, rows))  # [groups, rows of a microbatch, ...]: of each group, one begins here
        idle = jax.tree.map(lambda x: jnp.zeros_like(x[0]), given)

        def turn(state: Any, t: jax.Array) -> tuple[Any, None]:
            coming, going, leaving, done = state
            since = t - me  # turns since the first microbatch was here
            repeat = since % around // stages if repeats > 1 else 0
            number = (since // around * stages + since % stages) % parts
            coming = _choose(t % around == 0, _at(given, t // around), coming)
            x, read = jax.tree.map(_whole, _choose((me == 0) & (since % around < stages), coming, going))

            def one(x: Any, xs: Any, kind: Any) -> Any:
                weights, extra = _at(xs, repeat)
                return layer(x, read, (weights, _own_keys(extra, number)), kind)

            x = through(one, x, (params, per_layer), kinds[:chunk])
            leaving = _choose(me == stages - 1, x, leaving)
            group = jnp.maximum(t + 1 - stages, 0) // around  # all of it is home at the last turn that writes here
            done = jax.tree.map(lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, group, 0), done, leaving)
            return (_shift(coming, -1), _shift((x, read), 1), _shift(leaving, -1), done), None

        start = (idle, idle, idle[0], jax.tree.map(jnp.zeros_like, given[0]))
        turns = parts * repeats + stages - 1
        done = jax.lax.scan(turn, start, jnp.arange(turns, dtype=jnp.int32))[0][3]
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), done)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        program, in_specs=(split, split, split, whole), out_specs=split, axis_names={AXIS}, check_vma=False
    )(params, carry, rows, per_layer)  # fmt: skip


def _at(tree: Any, index: Any, axis: int = 0) -> Any:
    """x[index] of each array: a slice, where JAX would gather, which is harder to split."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False), tree)


def _choose(when: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(when, a, b), one, other)


def _whole(x: jax.Array) -> jax.Array:
    """Rows of ids lie whole on devices here, as everywhere."""
    return axes.constrain(x, "B" + "_" * (x.ndim - 1)) if jnp.issubdtype(x.dtype, jnp.integer) else x


def _shift(tree: Any, by: int) -> Any:
    """What each stage has, to the next (by 1) or to the one before."""
    stages = axes.ways((AXIS,))
    ring = [(s, (s + by) % stages) for s in range(stages)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _own_keys(extra: Any, number: jax.Array) -> Any:
    """Dropout's keys, others for each microbatch: with the same it would zero the same places of each."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.fold_in(x, number) if is_key(x) else x, extra)


def _dealt(x: jax.Array, stages: int, repeats: int, me: jax.Array) -> jax.Array:
    """A stage's layers [L / stages, ...], of those that lie in a row, to [chunk, repeats, ...]: chunk c of all belongs
    to stage c mod stages. In each of `repeats` rounds every stage sends one chunk and gets one.

    By Bézout, s repeats mod stages meets each multiple of their common divisor once in a sweep of stages / divisor.
    """
    x = x.reshape(repeats, -1, *x.shape[1:])
    if repeats > 1:
        common, s, got = math.gcd(stages, repeats), np.arange(stages), []
        place = np.zeros((stages, repeats), int)
        for turn in range(repeats):
            sent = turn // common * common + (turn + s // (stages // common)) % common
            to, slot = (s * repeats + sent) % stages, (s * repeats + sent) // stages
            place[to, slot] = turn
            got.append(jax.lax.ppermute(_at(x, jnp.asarray(sent)[me]), AXIS, list(zip(s.tolist(), to.tolist()))))
        x = jnp.stack([_at(jnp.stack(got), turn) for turn in jnp.asarray(place)[me]])
    return x.swapaxes(0, 1)
