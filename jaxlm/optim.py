"""Optimisers by their Optax name, learning-rate schedules, and what decays.

optimizer(shapes, name="adamw", lr=1e-3, schedule="cosine", warmup=100, steps=2000, weight_decay=0.1, clip=1.0)
"""

from collections.abc import Callable
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import axes, lookup

SCHEDULES: dict[str, Callable] = {
    # share of the peak, by progress p in [0, 1] after the warm-up, and d: the share of that time in which wsd decays
    "constant": lambda p, d: jnp.ones_like(p),
    "linear": lambda p, d: 1.0 - p,
    "cosine": lambda p, d: 0.5 * (1.0 + jnp.cos(jnp.pi * p)),  # arXiv:1608.03983, without restarts
    "wsd": lambda p, d: jnp.minimum(1.0, (1.0 - p) / d),  # warmup, stable, decay: arXiv:2404.06395
}
# Options of Optax's: how much of a mean a step keeps; what cannot be negative; what is there once at least.
SHARES = ("b1", "b2", "b3", "beta", "adam_b1", "adam_b2", "decay_rate", "momentum")
SIZES = ("eps", "eps_root", "adam_eps_root", "adam_weight_decay", "consistent_rms")
COUNTS = ("ns_steps",)
MULTIPLIES = ("muon",)  # whose updates are products of matrices, where others go through each parameter a few times


def learning_rate(
    name: str, lr: float, steps: int, warmup: int = 0, final: float = 0.1, decay: float = 0.2
) -> Callable:
    """Learning rate by step: linear warm-up to `lr`, then by `name` down to `final * lr` at the last step.

    `rsqrt` falls as 1/sqrt(step) from the end of the warm-up on, whatever `steps` is (arXiv:1910.10683, section 3.1.2).
    """
    if name != "rsqrt":
        shape = lookup.key("config.optimizer.schedule", name, SCHEDULES | {"rsqrt": None})
    if not 0 <= warmup <= steps:
        raise lookup.Mistake(f"config.optimizer.warmup={warmup} is not between 0 and config.steps={steps}")
    lookup.within("config.optimizer.", 0, lr=lr)
    lookup.within("config.optimizer.", 0, 1, final=final)
    lookup.within("config.optimizer.", 1e-6, 1, decay=decay)

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        up = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if name == "rsqrt":
            return lr * up * jax.lax.rsqrt(jnp.maximum(step, warmup) / max(warmup, 1) + (warmup == 0))
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        down = shape(progress, decay)
        low = final if name != "constant" else 0.0
        return lr * up * (low + (1.0 - low) * down)

    return rate


def optimizer(
    shapes: Any, *, steps: int, name: str = "adamw", lr: float = 1e-3, schedule: str = "cosine", warmup: int = 0,
    final: float = 0.1, decay: float | None = None, weight_decay: float = 0.0, clip: float = 0.0, **options: Any,
) -> tuple[optax.GradientTransformation, Callable]:  # fmt: skip
    """The gradient transformation for parameters of these shapes, and the learning rate by step.

    `name` is any optimiser of Optax that takes a learning rate, and `options` are its own keywords. Weight decay is
    decoupled for all of them: each step takes lr x weight_decay x the parameter off matrices and embeddings, nothing
    off vectors and norms. Muon turns the matrices; embeddings and vectors get Adam. `decay` is wsd's, but where the
    optimiser has one (rmsprop). Raises `Mistake` for an unknown
    name or option, and for values that cannot be.
    """
    lookup.within("config.optimizer.", 0, weight_decay=weight_decay, clip=clip)
    make = lookup.key("config.optimizer.name", name, _optimizers())
    own = set(inspect.signature(make).parameters) - {"learning_rate", "mask", "weight_decay_mask"}
    lookup.known("config.optimizer", options, own | lookup.keywords(optimizer) - {"steps"})
    lookup.typed("config.optimizer", make, options)
    if "decay" in own and decay is not None:  # rmsprop's
        if schedule == "wsd":
            raise lookup.Mistake(f"config.optimizer.decay={decay}: both wsd and {name} have one; take another schedule")
        lookup.within("config.optimizer.", 0, 1, decay=decay)
        options, decay = {**options, "decay": decay}, None
    rate = learning_rate(schedule, lr, steps, warmup, final, 0.2 if decay is None else decay)
    for names, *bounds in ((SHARES, 0, 1), (SIZES, 0), (COUNTS, 1)):
        numbers = {name: options[name] for name in names if isinstance(options.get(name), int | float)}
        lookup.within("config.optimizer.", *bounds, **numbers)
    told = dict(options)
    if "weight_decay" in inspect.signature(make).parameters:
        options = {"weight_decay": 0.0, **options}
    if name == "muon":
        options = {"muon_weight_dimension_numbers": muon_dimensions, "consistent_rms": 0.2, **options}
    if options.get("mu_dtype") is not None:
        lookup.key("config.optimizer.mu_dtype", options["mu_dtype"], dict.fromkeys(("float32", "bfloat16", "float16")))
    decays = jax.tree_util.tree_map_with_path(lambda path, _: axes.is_matrix(path), shapes)
    try:
        own_part = make(rate, **options)
        jax.eval_shape(lambda params: own_part.update(params, own_part.init(params), params), shapes)
    except (TypeError, ValueError, AssertionError) as e:
        raise lookup.Mistake(f"config.optimizer: Optax's {name} with {told} fails: {e}") from e
    parts = [
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        own_part,
        optax.add_decayed_weights(lambda step: -weight_decay * rate(step), decays)
        if weight_decay
        else optax.identity(),
    ]
    return optax.chain(*parts), rate


def _optimizers() -> dict[str, Callable]:
    """What Optax has that takes a learning rate, by name."""
    found = {**vars(optax.contrib), **vars(optax)}
    return {n: f for n, f in found.items() if n.islower() and n[0] != "_" and callable(f) and _takes_rate(f)}


def _takes_rate(make: Callable) -> bool:
    return "learning_rate" in inspect.signature(make).parameters


def muon_dimensions(params: Any) -> Any:
    """Which axes of each weight make Muon's matrix: in and out, cut around the width D, one for each layer and expert;
    None (Adam) for the rest: embeddings, and tables without a D, which are looked up, too.
    """

    def dimensions(path, x):
        letters = axes.of(axes.name_of(path)) or ""
        if not axes.is_matrix(path) or set(letters) & set("VT") or "D" not in letters:
            return None
        letters = letters.removeprefix("E")
        first, second = axes.cut(letters)
        stacked = x.ndim - len(letters)
        split = stacked + len(first)
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(stacked, split)), tuple(range(split, split + len(second)))
        )

    return jax.tree_util.tree_map_with_path(dimensions, params)
