"""Speed and memory, one JSON object a line, beside a peer measured in the same sitting.

    scripts/bench.py train  --json [--layers=6 --heads=6 --width=384 --context=256 --batch=12 --vocab=65]
                                   [--dtype=float32,bfloat16]
    scripts/bench.py decode --json [--batch=1 --prompt=32 --new=128]    GPT-2 124M shape, random weights
    scripts/bench.py reading --json --dtype=bfloat16                    a token beside the mere reading of its weights
    scripts/bench.py loss   --json                                      peak temporary memory, chunked against full
    scripts/bench.py families --json [--layers=6 --width=384 ...]       forward + backward of every family, one shape
    scripts/bench.py depth  --json                                      compile time of 4, 12, 48 layers, scan and loop
    scripts/bench.py start  --json                                      to the first step of a run, first and later
    scripts/bench.py costs  --json [--variant=context]                  how a step grows with each size, with exponents
    scripts/bench.py saves  --json [--layers=6 --width=384 ...]         step times with saves and without
    scripts/bench.py memory --json [--layers=48 --width=1600 ...]       what saving and restoring take of it
    scripts/bench.py loader --json [--context=2048 --batch=8]           from a token store to batches, every objective
    scripts/bench.py prepare --json [--megabytes=200]                   clean + dedup + tokenize; tokenizers alone

    --peer="PYTHON peer_torch.py"    runs the peer with the same shape, before and after, and prints the ratio

Every measurement runs in a process of its own: the first step counts import and compilation, and peak memory is the
process's. The keys are the peer's: dtype, params, first_step_s, step_ms, tokens_per_s, gflops; times are medians over
--repeats.
"""

import argparse
from collections.abc import Iterable
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import bench_costs
import bench_data
import bench_saves
import bench_start

from jaxlm import lookup, program

DEFAULTS = dict(
    layers=4, heads=4, width=128, context=64, batch=12, vocab=65, repeats=15, prompt=32, new=128, megabytes=200
)
SMALL = dict(layers=6, heads=6, width=384, context=256)
LOADER = dict(context=2048, batch=8, vocab=32_000)
GPT2 = dict(layers=12, heads=12, width=768, context=1024, batch=1, vocab=50257)
XL = dict(layers=48, heads=25, width=1600, context=1024, vocab=50257)
SHAPES = dict(decode=GPT2, reading=GPT2, families=SMALL, saves=SMALL, loader=LOADER, memory=XL)


def gpt2(a: argparse.Namespace) -> dict[str, Any]:
    """The peer's model, as a config names it."""
    return dict(name="gpt2", layers=a.layers, heads=a.heads, width=a.width, context=a.context)


def train(a: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """One train step of a GPT-2 of this shape, as `jaxlm train` runs it."""
    return steps(gpt2(a), a, dtype, abreast=True)


def steps(model: dict[str, Any], a: argparse.Namespace, dtype: str, *, abreast: bool = False) -> dict[str, Any]:
    """One train step with AdamW and clipping: the median of its times. On one device, or on as many as `jaxlm train`
    takes a CPU for.
    """
    began = time.perf_counter()
    import jax
    import numpy as np

    from jaxlm import axes, step
    from jaxlm.data.words import Words

    imported = time.perf_counter() - began
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as `jaxlm train` does
    if abreast and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update(
            "jax_num_cpu_devices", step.abreast(model=model, vocab=a.vocab, batch=a.batch, length=a.context)
        )
    mesh = axes.mesh(devices=None if abreast else jax.devices()[:1])
    with axes.on(mesh):
        parts = step.assemble(
            model=model, optimizer=dict(name="adamw", lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.1, clip=1.0),
            steps=1000, length=a.context, words=Words.of_size(a.vocab), mesh=mesh, rules=axes.RULES, dtype=dtype,
        )  # fmt: skip
        state = jax.jit(functools.partial(step.init, parts.tx, ema=0.0))(parts.blueprint.init(0, mesh))
        ids = np.random.default_rng(0).integers(0, a.vocab, (2, a.batch, a.context), dtype=np.int32)
        batch = dict(tokens=ids[0], labels=ids[1], weights=np.ones(ids[0].shape, np.float32))
        times = []
        for _ in range(a.repeats + 2):
            start = time.perf_counter()
            state, metrics = parts.update(state, axes.put(batch, a.batch, mesh))
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
            if len(times) == 1:
                first = time.perf_counter() - began
    median = statistics.median(times[2:])
    params = parts.blueprint.size - sum(math.prod(x.shape) for x in [parts.blueprint.shapes.get("positions_TD")] if x)
    flops = parts.blueprint.flops_per_token(a.context) * a.batch * a.context
    return dict(
        device=jax.devices()[0].platform, mode="jit", dtype=dtype, params=params,
        import_s=round(imported, 2), first_step_s=round(first, 2), step_ms=round(median * 1e3, 2),
        tokens_per_s=round(a.batch * a.context / median), gflops=round(flops / median / 1e9, 1),
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )  # fmt: skip


def decode(a: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Greedy continuation by a GPT-2 of this shape."""
    return continuation(gpt2(a), a, dtype)


def continuation(model: dict[str, Any], a: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Greedy continuation of `batch` prompts by `new` tokens, prefill included, random weights: the median of its
    times.
    """
    import numpy as np

    from jaxlm.decode.engine import Engine
    from jaxlm.decode.sampling import Sampling
    from jaxlm.models import Blueprint

    blueprint = Blueprint.of(model, vocab=a.vocab, dtype=dtype)
    engine = Engine(blueprint, blueprint.init(0))
    prompts = np.random.default_rng(0).integers(0, a.vocab, (a.batch, a.prompt)).tolist()
    times = []
    for _ in range(1 + max(3, a.repeats // 5)):
        start = time.perf_counter()
        rows = engine.generate(prompts, Sampling(temperature=0.0), max_new_tokens=a.new, steps=a.new)
        times.append(time.perf_counter() - start)
        assert [len(row) for row in rows] == [a.new] * a.batch
    median = statistics.median(times[1:])
    rate = round(a.batch * a.new / median, 1)
    return dict(dtype=dtype, batch=a.batch, new_tokens_per_s=rate, first_call_s=round(times[0], 2))


def reading(a: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """A token of `decode`, prompts included, beside what memory takes to give as many bytes as the weights that it
    reads: the largest number among them, looked for by all cores. Medians of both, taken in turn.
    """
    from concurrent.futures import ThreadPoolExecutor

    import jax
    import numpy as np

    from jaxlm.decode.engine import Engine
    from jaxlm.decode.sampling import Sampling
    from jaxlm.models import Blueprint

    blueprint = Blueprint.of(gpt2(a), vocab=a.vocab, dtype=dtype)
    engine = Engine(blueprint, blueprint.init(0))
    prompts = np.random.default_rng(0).integers(0, a.vocab, (a.batch, a.prompt)).tolist()
    params, table = engine.decoding()
    head = engine.params["embed_VD"] if table is None else table
    weights = sum(x.nbytes for x in jax.tree.leaves((params["blocks"], head)))
    parts = np.array_split(np.ones(weights // 4, np.float32), program.cores())
    tokens, bounds = [], []
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(1 + max(7, a.repeats // 2)):
            start = time.perf_counter()
            rows = engine.generate(prompts, Sampling(temperature=0.0), max_new_tokens=a.new, steps=a.new)
            tokens.append((time.perf_counter() - start) / len(rows[0]))
            for _ in range(3):
                start = time.perf_counter()
                list(pool.map(np.max, parts))
                bounds.append(time.perf_counter() - start)
    token, bound = statistics.median(tokens[1:]), statistics.median(bounds[3:])
    return dict(
        dtype=dtype, batch=a.batch, weights_mb=round(weights / 1e6), gb_per_s=round(weights / bound / 1e9, 1),
        read_ms=round(1e3 * bound, 2), token_ms=round(1e3 * token, 2), ratio=round(token / bound, 2),
    )  # fmt: skip


def loss(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """What the compiler sets aside for the loss and gradients at GPT-2's vocabulary, 8 x 1,024 tokens, width 768."""
    import jax

    from jaxlm.nn.linear import Head
    from jaxlm.nn.loss import cross_entropy

    B, T, D, V = 8, 1024, 768, 50257
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "float32"))
    ]
    chunk = None if variant == "auto" else int(variant)
    gradient = jax.jit(
        jax.value_and_grad(lambda x, table, *xs: cross_entropy(x, Head(table), *xs, chunk=chunk).loss, argnums=(0, 1))
    )
    memory = gradient.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    return dict(tokens=B * T, vocab=V, chunk=variant, temporary_mb=round(memory.temp_size_in_bytes / 2**20))


def families(a: argparse.Namespace, name: str) -> dict[str, Any]:
    """Loss and gradients of one family, without an optimiser: the median of its times. An encoder-decoder has `layers`
    on either side, and its tokens are those of one; of four experts a token goes to two.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxlm import lookup
    from jaxlm.models import Blueprint
    from jaxlm.nn.loss import cross_entropy

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sizes = dict(layers=a.layers, width=a.width, heads=a.heads, kv_heads=a.heads, head_width=a.width // a.heads)
    sizes |= dict(mlp_width=4 * a.width, context=a.context, experts=4, chosen=2)
    known = {f.name for f in dataclasses.fields(lookup.module("jaxlm.models", name).Config)}
    blueprint = Blueprint.of({"name": name, **{k: v for k, v in sizes.items() if k in known}}, vocab=a.vocab)
    tokens = jax.random.randint(jax.random.key(0), (a.batch, a.context), 0, a.vocab)
    ones = jnp.ones(tokens.shape, jnp.int32)

    def mean(params):
        model = blueprint.bind(params)
        if blueprint.kind == "encoder-decoder":
            about = dict(memory_BSD=model.encode(tokens, segments_BS=ones), memory_segments_BS=ones)
            x = model.hidden(tokens, segments_BT=ones, **about)[0]
        else:
            x = model.hidden(tokens, segments_BT=ones)[0]
            x = model.for_head(x) if blueprint.kind == "encoder" else x
        return cross_entropy(x, model.head, tokens, ones.astype(jnp.float32)).loss / tokens.size

    params, step, times = blueprint.init(0), jax.jit(jax.value_and_grad(mean)), []
    for _ in range(a.repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(step(params))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])
    flops = blueprint.flops_per_token(a.context) * tokens.size
    return dict(
        family=name, kind=blueprint.kind, params=blueprint.size, first_s=round(times[0], 2),
        step_ms=round(median * 1e3, 1), tokens_per_s=round(tokens.size / median), gflops=round(flops / median / 1e9, 1),
    )  # fmt: skip


def depth(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Time to trace, lower and compile a narrow Llama's loss and gradients, layers scanned or standing in a row."""
    import jax

    from jaxlm.models import Blueprint
    from jaxlm.nn import stack
    from jaxlm.objectives import clm

    how, layers = variant.split(":")
    stack.IN_A_ROW = 0 if how == "scan" else int(layers)
    model = dict(name="llama", layers=int(layers), width=64, heads=4, kv_heads=4, head_width=16, mlp_width=128)
    blueprint = Blueprint.of(model, vocab=64)
    row = jax.ShapeDtypeStruct((2, 64), "int32")
    batch = dict(tokens=row, labels=row, weights=jax.ShapeDtypeStruct((2, 64), "float32"), segments=row)
    gradient = jax.jit(jax.grad(lambda params, batch: clm.loss(blueprint.bind(params), batch).loss))
    start = time.perf_counter()
    lowered = gradient.lower(blueprint.shapes, batch)
    traced = time.perf_counter() - start
    lowered.compile()
    took = time.perf_counter() - start
    return dict(layers=int(layers), how=how, trace_s=round(traced, 2), compile_s=round(took - traced, 2))


VARIANTS = {
    "loss": ["1024", "auto"],
    "depth": [f"{how}:{layers}" for layers in (4, 12, 48) for how in ("scan", "loop")],
    "costs": [*bench_costs.SIZES],
    "start": bench_start.VARIANTS,
    **bench_data.VARIANTS,
    **bench_saves.VARIANTS,
}
WHAT = dict(
    train=train, decode=decode, reading=reading, loss=loss, families=families, depth=depth,
    costs=bench_costs.costs, start=bench_start.start, loader=bench_data.loader, prepare=bench_data.prepare,
    saves=bench_saves.saves, memory=bench_saves.memory,
)  # fmt: skip


def measure(a: argparse.Namespace, what: str, variant: str) -> dict[str, Any]:
    """Run one measurement in a fresh process and return its line."""
    shape = [f"--{name}={getattr(a, name)}" for name in DEFAULTS]
    done = subprocess.run(
        [sys.executable, __file__, what, *shape, f"--variant={variant}"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def peer(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The peer's lines for the same shape, in the environment of its own users: without our setting of malloc."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    what = {"train": "speed", "decode": "decode"}[a.what]
    others = ("megabytes",) if what == "decode" else ("megabytes", "prompt", "new")
    names = [name for name in DEFAULTS if name not in others]
    shape = [f"--{name}={getattr(a, name)}" for name in names]
    done = subprocess.run(
        [*a.peer.split(), what, *shape, *a.peer_flags.split()],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def shown(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All the lines, each printed as soon as it is there."""
    found = []
    for line in lines:
        found.append(line)
        print(json.dumps(line), flush=True)
    return found


def main() -> None:
    """Measure, print a line each, and the ratio to the peer's best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WHAT])
    for name in DEFAULTS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--variant", default="")
    parser.add_argument("--json", action="store_true", help="(always; kept so that the command says what it prints)")
    parser.add_argument("--peer", default="")
    parser.add_argument("--peer-flags", default="--dtype=float32")
    a = parser.parse_args()
    defaults = DEFAULTS | SHAPES.get(a.what, {})
    for name, value in defaults.items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    if a.variant:
        print(json.dumps(WHAT[a.what](a, a.variant)))
        return
    program.ask_for_huge_pages()  # as `jaxlm train` does
    before = shown(peer(a)) if a.peer else []
    names = [name for name in lookup.names("jaxlm.models") or [] if name != "ngram"]
    variants = names if a.what == "families" else VARIANTS.get(a.what) or a.dtype.split(",")
    ours = shown(measure(a, a.what, variant) for variant in variants)
    after = shown(peer(a)) if a.peer else []
    if a.peer and a.what in ("train", "decode"):
        rate = "tokens_per_s" if a.what == "train" else "new_tokens_per_s"
        best = max(x[rate] for x in ours), max(x[rate] for x in (*before, *after))
        print(json.dumps(dict(ratio=round(best[0] / best[1], 3), what=f"best {rate} of jaxlm over the peer's best")))


if __name__ == "__main__":
    main()
