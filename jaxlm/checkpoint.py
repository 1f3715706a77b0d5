"""Checkpoints by Orbax: asynchronous, the newest and the best kept, damage found out.

    WORKDIR/checkpoints/STEP/params, opt, ...   the training state, a folder a part, whatever mesh it was on
                             seal               a checksum of every array, which restoring must reproduce

A checkpoint that is incomplete, unreadable or does not match its seal is skipped with a warning, and the next older one
is used.
"""

from collections.abc import Mapping, Sequence
import contextlib
import logging
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxlm import axes, chunks, lookup, s3
from jaxlm.lookup import Mistake
from jaxlm.paths import absolute, move

log = logging.getLogger("jaxlm")
AT_ONCE = 2**20  # elements of an array that a checksum looks at together


def _sum_bits(x: jax.Array, layer: jax.Array | int = 0) -> jax.Array:
    """A uint32 sum over an array's elements, each hashed with its place: the same however the array is split.

    The hash is MurmurHash3's finaliser; a plain sum of bits would not see an even number of flipped signs.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.full(x.shape, layer, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def seal(state: Any) -> dict[str, int]:
    """A checksum of every array in a tree, by path."""
    sums = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        whole = x.ndim > 1 and len(x) == x.sharding.shard_shape(x.shape)[0]
        sums[jax.tree_util.keystr(path)] = int((_sum_rows if whole else _sum)(x))
    return sums


_sum = jax.jit(_sum_bits)


@jax.jit
def _sum_rows(x: jax.Array) -> jax.Array:
    """The same for an array whose first axis is not split, a few rows at a time: a CPU writes down what it sums up."""
    rows = max(1, AT_ONCE * len(x) // max(1, x.size))
    sums = jax.lax.map(lambda i: _sum_bits(x[i], i), jnp.arange(len(x), dtype=jnp.uint32), batch_size=rows)
    return sums.sum(dtype=jnp.uint32)


class Checkpoints:
    """The checkpoints of one workdir. Use as a context: leaving it waits for the save under way."""

    def __init__(self, workdir: str, *, newest: int = 2, best: int = 1, metric: str = "loss", mode: str = "min"):
        lookup.within("config.checkpoint.", 1, newest=newest)
        lookup.within("config.checkpoint.", 0, best=best)
        lookup.key("config.checkpoint.mode", mode, dict(min=min, max=max))
        self.metric = metric
        worst = float("inf") if mode == "min" else float("-inf")
        self._score = lambda metrics: metrics.get(metric, worst) if metrics else worst
        self._better = min if mode == "min" else max
        policies: list[Any] = [keep.LatestN(newest)]
        if best:
            policies.append(
                keep.BestN(
                    get_metric_fn=self._score, reverse=mode == "min", n=best, keep_checkpoints_without_metrics=False
                )
            )
        registry, trees = ocp.handlers.DefaultCheckpointHandlerRegistry(), chunks.handler()
        for kind in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
            registry.add(None, kind, trees)
        if str(workdir).startswith("s3://"):
            s3.teach()
        self._manager = ocp.CheckpointManager(
            absolute(workdir) / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies),
                best_fn=self._score,  # not consulted for what to keep, but metrics are only written where there is one
                best_mode=mode,
                cleanup_tmp_directories=True,
            ),
            handler_registry=registry,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that were saved completely, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copy the state off the devices and write it in the background. Raises what went wrong with it, or with the
        save before it; what was saved earlier is untouched.
        """
        self._manager.check_for_errors()
        parts = {
            name: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(chunks.cut, tree)) for name, tree in state.items()
        }
        items = ocp.args.Composite(**parts, seal=ocp.args.JsonSave(seal(state)))
        self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None, force=True)

    def wait(self) -> None:
        """Return when everything is on disk. Raises what kept it from there."""
        self._manager.wait_until_finished()

    def restore(self, shapes: Mapping[str, Any], steps: Sequence[int] | None = None) -> tuple[int, Any] | None:
        """The newest good state, placed as `shapes` (with shardings) says, and its step; None where there is none.

        `shapes` may name some parts of the state only. Raises `Mistake` when checkpoints exist (of `steps`, if given)
        and every one is damaged or of another model.
        """
        reasons = []
        for step in reversed(self.steps()) if steps is None else steps:
            try:
                found = self._read(step, shapes)
            except Exception as e:
                reasons.append(f"step {step}: {_first_line(e)}")
                log.warning("checkpoint of step %d is damaged and is skipped (%s)", step, _first_line(e))
                continue
            return step, found
        if reasons:
            raise Mistake(
                "no checkpoint can be used; move the folder `checkpoints` away to start afresh. " + "; ".join(reasons)
            )
        return None

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of steps beyond `after`, which are damaged, so that these steps can be saved anew."""
        damaged = [step for step in self.steps() if step > after]
        if damaged and jax.process_index() == 0:
            for step in damaged:
                folder = epath.Path(self._manager.directory) / str(step)
                move(folder, folder.with_name(f"{step}.damaged-{time.time_ns()}"))
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def _read(self, step: int, shapes: Mapping[str, Any]) -> Any:
        parts = {
            name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in shapes.items()
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**parts, seal=ocp.args.JsonRestore()))
        state = {name: found[name] for name in shapes}
        differs = [path for path, value in seal(state).items() if found["seal"].get(path) != value]
        if differs:
            raise ValueError(f"{len(differs)} arrays are not what was saved, the first: {differs[0]}")
        return state

    def parts(self, step: int) -> set[str]:
        """Which parts of the state a checkpoint holds: params, opt, ... and ema where a moving average was kept."""
        return {p.name for p in (epath.Path(self._manager.directory) / str(step)).iterdir() if p.is_dir()}

    def best(self) -> int | None:
        """The step with the best metric among those saved with one."""
        scores = {
            step: self._score(self._manager.metrics(step)) for step in self.steps() if self._manager.metrics(step)
        }
        return self._better(scores, key=scores.__getitem__) if scores else None


def restore_params(
    workdir: str,
    shapes: Any,
    *,
    step: str | int = "newest",
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] = axes.RULES,
) -> tuple[int, Any]:
    """The parameters alone (their moving average where one was kept), for evaluation and serving: (step, tree).

    `shapes` is the Blueprint's; `step` is newest, best or a number. Raises `Mistake` when there is no such checkpoint.
    """
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise Mistake(f"{workdir} has no finished checkpoint")
        if step == "best":
            steps = [checkpoints.best() or steps[-1]]
        elif step != "newest":
            if not str(step).isdigit() or int(step) not in steps:
                raise Mistake(
                    f"{workdir} has no checkpoint {step!r}; choices: newest, best, {', '.join(map(str, steps))}"
                )
            steps = [int(step)]
        mesh = mesh or axes.mesh(devices=jax.local_devices()[:1])
        part = "ema" if "ema" in checkpoints.parts(steps[-1]) else "params"
        placed = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            axes.shardings(shapes, mesh, rules),
        )
        number, state = checkpoints.restore({part: placed}, steps[::-1]) or (0, {})
        return number, state[part]


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:200]
