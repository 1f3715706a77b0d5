"""What a plan says, of training or of serving, and how it is printed.

Each figure is of one of three kinds, and the tables say which: the compiler's own (it compiled this program for these
devices), an estimate (from the compiler's, or by arithmetic), or a bound (no program on these devices can be better).
What is not known is None, and not printed.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlm.planning.costs import KERNEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a train step will take, by one device unless said otherwise. Bytes, seconds, FLOPs."""

    model: str
    compiled: bool  # else by arithmetic alone: memory is then an estimate, times are bounds
    devices: int
    hosts: int
    kind: str
    mesh: dict[str, int]
    batch: int
    length: int
    remat: str
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: float | None
    flops_per_token: float
    flops_per_step: float  # of the model, all devices together
    estimated_cycles: int | None = None
    compute_seconds: float | None = None
    attention_seconds: float | None = None
    expert_seconds: float | None = None  # of the kernels that multiply rows by their experts' matrices
    exposed_seconds: float | None = None
    step_seconds: float | None = None
    roofline_seconds: float | None = None
    sending_seconds: float | None = None  # by arithmetic: all that is sent, if links are all that there is to wait for
    tokens_per_second_per_device: float | None = None
    mfu: float | None = None
    days: float | None = None  # for the config's steps
    dollars: float | None = None  # for them, where a price is given
    input_bytes_per_step: float  # of the host that reads most
    input_bytes_per_second: float | None = None  # of that host
    compile_seconds: float | None = None
    uncounted: list[str] = dataclasses.field(default_factory=list)  # kernels whose time is not known, nor in the above
    operations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    host_bytes: float = 0.0  # that a device moves to its host's memory and back in a step
    host_seconds: float | None = None  # that it takes, beside other work as far as there is so much


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What reading prompts and writing behind them will take, by one device unless said otherwise."""

    model: str
    compiled: bool
    devices: int
    kind: str
    mesh: dict[str, int]
    rows: int
    prompt: int
    new: int
    parameters: int
    parameter_bytes: int
    cache_bytes: int
    prefill_temporary_bytes: int | None = None
    decode_temporary_bytes: int | None = None
    peak_bytes: int
    hbm_bytes: float | None
    prefill_seconds: float | None = None  # of all prompts together
    prefill_roofline_seconds: float | None = None
    token_seconds: float | None = None  # one more token of every row
    expert_seconds: float | None = None  # of it, the kernels that multiply rows by their experts' matrices
    options_seconds: float | None = None  # more, where rows ask for top-k, top-p, penalties and bans
    token_roofline_seconds: float | None = None
    bound_by: str | None = None  # what the roofline of a token is: reading memory, or products
    tokens_per_second_per_device: float | None = None
    most_tokens_per_second_per_device: float | None = None
    compile_seconds: float | None = None
    uncounted: list[str] = dataclasses.field(default_factory=list)
    operations: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of a token
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def show(plan: Plan | Serving, console: Console) -> None:
    """Print a plan as tables."""
    table = Table(title=f"{plan.model} on {plan.devices} x {plan.kind}, {mesh(plan)}", show_header=False)
    for label, text in _training(plan) if isinstance(plan, Plan) else _serving(plan):
        table.add_row(label, text)
    console.print(table)
    if not plan.compiled:
        console.print(
            "By arithmetic, as no compiler for these devices is here: what is at least, or at most, is a bound; what "
            "is about is an estimate. Neither is a prediction of the speed",
            highlight=False,
        )
    if plan.uncounted:
        console.print(f"Not in these times, as nothing tells how long they take: {', '.join(plan.uncounted)}")
    if plan.expert_seconds:
        console.print(
            "Experts' kernels, for which the compiler tells no time, are counted as if they reached the "
            f"{KERNEL:.0%} of the peak that were fitted to attention's, or read at the memory's full speed where that "
            "takes longer, all experts getting as many tokens. None of it was measured",
            highlight=False,
        )
    if plan.operations:
        table = Table("ms", "asked for by", "", title="What takes longest")
        for row in plan.operations:
            table.add_row(f"{row['seconds'] * 1e3:.3g}", row["source"], row["when"])
        console.print(table)
    if plan.collectives:
        title = "What devices send each other" + ("" if plan.compiled else " (estimates)")
        table = Table("over", "kind", "times", "sent by a device", "ms", title=title)
        for row in plan.collectives:
            spent = f"{row['seconds'] * 1e3:.3g}" if row["seconds"] else ""
            table.add_row(row["axes"], row["kind"], str(row["count"]), f"{row['bytes'] / 1e9:.3f} GB", spent)
        console.print(table)


def ranking(plans: Iterable[Plan], console: Console) -> None:
    """Print plans as the rows of one table, in the order that they come in."""
    table = Table("mesh", "remat", "batch", "peak", "tokens/s a device", "MFU", title="What fits, fastest first")
    for plan in plans:
        speed = f"{plan.tokens_per_second_per_device:,.0f}" if plan.tokens_per_second_per_device else "?"
        table.add_row(
            mesh(plan), plan.remat, str(plan.batch), ("" if plan.compiled else "about ") + _gb(plan.peak_bytes),
            speed if plan.compiled else f"at most {speed}", f"{plan.mfu:.1%}" if plan.mfu else "",
        )  # fmt: skip
    console.print(table)


def mesh(plan: Plan | Serving) -> str:
    """The axes of the mesh that split anything."""
    return " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"


def _training(plan: Plan) -> Iterable[tuple[str, str]]:
    yield "parameters", f"{plan.parameters:,}"
    yield "a device holds of them", _gb(plan.parameter_bytes)
    yield "of the optimizer", _gb(plan.optimizer_bytes)
    yield "of the batch", _gb(plan.batch_bytes)
    if plan.compiled:
        yield "of activations and other temporaries", _gb(plan.temporary_bytes)
    else:
        yield "of gradients and kept activations", f"about {_gb(plan.temporary_bytes)}"
    some = "about " if not plan.compiled else "at most " if plan.host_bytes else ""
    yield "at the peak", some + _room(plan.peak_bytes, plan.hbm_bytes)
    yield "model FLOPs per token, per step", f"{plan.flops_per_token:.3g}, {plan.flops_per_step:.3g}"
    if plan.roofline_seconds is not None:
        yield "a step takes at least", f"{plan.roofline_seconds:.3f} s (bound: all units at their peak)"
    if plan.sending_seconds is not None:
        yield "sending takes", f"about {plan.sending_seconds:.3f} s a step, beside that or after it"
    if plan.step_seconds is not None:
        yield "a step", f"{plan.step_seconds:.3f} s (estimate)"
        cycles = f" ({plan.estimated_cycles / 1e9:.3f} G cycles)" if plan.estimated_cycles else ""
        yield "of it products and the rest", f"{plan.compute_seconds:.3f} s{cycles}"
        yield "attention kernels", f"{plan.attention_seconds:.3f} s"
        if plan.expert_seconds:
            yield "experts' kernels", f"{plan.expert_seconds:.3f} s"
        yield "sending, while nothing else runs", f"{plan.exposed_seconds:.3f} s"
    if plan.host_bytes:
        spent = "not in the time" if plan.host_seconds is None else f"{plan.host_seconds:.3f} s beside other work"
        yield "to the host's memory and back", f"{_gb(plan.host_bytes)}, {spent}"
    some = "" if plan.compiled else "at most "
    if plan.tokens_per_second_per_device is not None:
        yield "tokens/s a device", f"{some}{plan.tokens_per_second_per_device:,.0f}"
    if plan.mfu is not None:
        yield "MFU", f"{plan.mfu:.1%}"
    if plan.days is not None:
        price = f", {plan.dollars:,.0f} $" if plan.dollars else ""
        yield "the config's steps take", f"{'' if plan.compiled else 'at least '}{plan.days:.2f} days{price}"
    rate = f", {some}{plan.input_bytes_per_second / 1e6:.3g} MB/s" if plan.input_bytes_per_second else ""
    hosts = "the one host" if plan.hosts == 1 else f"each of {plan.hosts} hosts"
    yield f"input of {hosts}", f"{plan.input_bytes_per_step / 1e6:.3g} MB a step{rate}"
    if plan.compile_seconds is not None:
        yield "compiled in", f"{plan.compile_seconds:.1f} s"


def _serving(plan: Serving) -> Iterable[tuple[str, str]]:
    yield "serves", f"{plan.rows} rows at once, prompts of {plan.prompt:,} tokens and {plan.new:,} new ones"
    yield "parameters", f"{plan.parameters:,}"
    yield "a device holds of them", _gb(plan.parameter_bytes)
    yield "of keys and values", _gb(plan.cache_bytes)
    for what, held in (("prefill", plan.prefill_temporary_bytes), ("decoding", plan.decode_temporary_bytes)):
        if held is not None:
            yield f"of temporaries in {what}", _gb(held)
    yield "at the peak", ("" if plan.compiled else "at least ") + _room(plan.peak_bytes, plan.hbm_bytes)
    if plan.prefill_roofline_seconds is not None:
        yield "reading all prompts takes at least", f"{plan.prefill_roofline_seconds * 1e3:.3g} ms (bound: products)"
    if plan.prefill_seconds is not None:
        yield "reading all prompts", f"{plan.prefill_seconds * 1e3:.3g} ms (estimate)"
    if plan.token_roofline_seconds is not None:
        bound = f"{plan.token_roofline_seconds * 1e3:.3g} ms (bound: {plan.bound_by})"
        yield "a token of every row takes at least", bound
    if plan.token_seconds is not None:
        more = f", {(plan.options_seconds or 0) * 1e3:.2g} more with top-k, top-p, penalties and bans"
        yield "a token of every row", f"{plan.token_seconds * 1e3:.3g} ms (estimate){more}"
    if plan.tokens_per_second_per_device is not None:
        yield "new tokens/s a device", f"{plan.tokens_per_second_per_device:,.0f} (estimate)"
    if plan.most_tokens_per_second_per_device is not None:
        yield "new tokens/s a device, at most", f"{plan.most_tokens_per_second_per_device:,.0f} (bound)"
    if plan.compile_seconds is not None:
        yield "compiled in", f"{plan.compile_seconds:.1f} s"


def _gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def _room(peak: float, hbm: float | None) -> str:
    """The peak beside what a device has, and how much that leaves."""
    if not hbm:
        return _gb(peak)
    left = f"fits, {_gb(hbm - peak)} to spare" if peak <= hbm else f"does not fit: {_gb(peak - hbm)} too many"
    return f"{_gb(peak)} of {_gb(hbm)}: {left}"
