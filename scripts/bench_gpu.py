"""Speed on one GPU, beside a peer on the same card in the same call: one JSON object a line.

    scripts/bench_gpu.py --peer="PYTHON peer_torch.py"       all of it; PYTHON has torch, in an environment of its own
    scripts/bench_gpu.py train decode --model=gpt2           a part
    scripts/bench_gpu.py --tiny                              the same program at toy sizes, on a CPU: does it run?

    train       tokens/s and MFU of GPT-2 124M (context 1,024) and Llama 3.2 1B (context 4,096), bfloat16, by what the
                backward pass keeps. The peer is a GPT-2 of the same layers, width, heads, context and vocabulary,
                eager and by torch.compile; of another model than ours, so compare MFU where that is the Llama's.
    attention   forward and backward pass of one layer's attention, by backend: ours with rows of two documents; cuDNN's
                (jax.nn.dot_product_attention) with plain causal rows, as it takes no documents
    decode      new tokens/s at batch 1, 32, 256 (32 + 128 tokens, greedy), and the share of the time that reading the
                weights once a token takes at the card's bandwidth

A batch that does not fit is halved, for us and for the peer alike. Every measurement has a process of its own, so that
none holds the other's memory. Not yet run on a GPU: none was to be had.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import bench

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        model=dict(name="gpt2", size="gpt2"), layers=12, heads=12, kv_heads=12, head_width=64, width=768, context=1024,
        vocab=50_257, batch=32,
    ),
    "llama": dict(
        model=dict(name="llama", size="llama3.2-1b"), layers=16, heads=32, kv_heads=8, head_width=64, width=2048,
        context=4096, vocab=128_256, batch=8,
    ),
}  # fmt: skip
SMALL = dict(layers=2, heads=2, width=32, context=64)
TINY: dict[str, dict[str, Any]] = {
    "gpt2": dict(model=dict(name="gpt2", **SMALL), **SMALL, kv_heads=2, head_width=16, vocab=128, batch=2),
    "llama": dict(
        model=dict(name="llama", **SMALL, kv_heads=1, head_width=16, mlp_width=64), **SMALL, kv_heads=1, head_width=16,
        vocab=128, batch=2,
    ),
}  # fmt: skip
VARIANTS = {
    "train": ["none", "dots", "full"],
    "attention": ["xla", "chunked", "triton", "cudnn"],
    "decode": ["1", "32", "256"],
}
FEW = VARIANTS | {"train": ["none"], "decode": ["1", "4"]}
FULL = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemoryError")  # what ends a process that asked for too much


def train(a: argparse.Namespace, remat: str) -> dict[str, Any]:
    """The train step of `jaxlm train`: the median of its times."""
    import jax

    line = bench.steps({**a.model, "remat": remat}, a, "bfloat16")
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    line = {key: line[key] for key in ("params", "first_step_s", "step_ms", "tokens_per_s", "gflops")}
    return dict(remat=remat, batch=a.batch, **line, mfu=share(line["gflops"] * 1e9), peak_gb=held and held / 1e9)


def share(flops: float) -> float | None:
    """Of this card's dense bfloat16 peak; None for a device that is not known, such as a CPU."""
    import jax

    from jaxlm import chips

    chip = chips.of(jax.devices()[0].device_kind)
    return chip and round(flops / chip.flops, 4)


def attention(a: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Forward and backward pass over [batch, heads, context, head width]: milliseconds, and the GFLOP/s of the half of
    the scores that a causal mask leaves (2 products forward, 5 backward).
    """
    import jax
    import jax.numpy as jnp

    from jaxlm.lookup import Mistake
    from jaxlm.nn.attention import BACKENDS, attend
    from jaxlm.nn.mask import Mask

    B, T, H = a.batch, a.context, a.head_width
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
        jax.random.normal(key, (B, heads, T, H), jnp.bfloat16)
        for key, heads in zip(keys, (a.heads, a.kv_heads, a.kv_heads, a.heads))
    )
    segments = jnp.broadcast_to(1 + (jnp.arange(T) >= T // 2), (B, T))

    def ours(q, k, v):
        return attend(q, k, v, Mask(causal=True, segments_BT=segments), backend)

    def cudnn(q, k, v):  # [B, T, N, H]
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)

    compute = ours if backend in BACKENDS else cudnn
    both = jax.jit(lambda q, k, v, d_out: jax.vjp(compute, q, k, v)[1](d_out))
    try:
        compiled = both.lower(q, k, v, d_out).compile()
    except (Mistake, ValueError, RuntimeError, NotImplementedError) as e:
        if any(word in str(e) for word in FULL):
            raise
        return dict(backend=backend, refused=str(e).splitlines()[0][:200])
    memory, times = compiled.memory_analysis(), []
    for _ in range(a.repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(q, k, v, d_out))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    flops = 7 * 2 * B * a.heads * T * T * H / 2
    return dict(
        backend=backend, batch=B, ms=round(median * 1e3, 3), gflops=round(flops / median / 1e9, 1),
        mfu=share(flops / median), temporary_mb=memory and round(memory.temp_size_in_bytes / 2**20, 1),
    )  # fmt: skip


def decode(a: argparse.Namespace, _: str) -> dict[str, Any]:
    """Greedy continuation in bfloat16, prefill included: new tokens/s."""
    import jax

    from jaxlm import chips
    from jaxlm.models import Blueprint

    line = bench.continuation(a.model, a, "bfloat16")
    chip, size = chips.of(jax.devices()[0].device_kind), 2 * Blueprint.of(a.model, vocab=a.vocab).size
    steps_per_s = line["new_tokens_per_s"] / a.batch
    return line | dict(of_bandwidth=chip and round(steps_per_s * size / chip.read, 3))


WHAT = dict(train=train, attention=attention, decode=decode)


def device(tiny: bool) -> str:
    """What is measured on. Ends the program where that is no GPU, unless it is only tried."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    platform, _, kind = (done.stdout.splitlines() or [""])[-1].partition("|")
    if platform == "gpu" or (tiny and platform):
        return kind
    sees = f"jax sees only {platform}" if platform else (done.stderr.splitlines() or ["jax does not start"])[-1]
    print(
        f"bench_gpu: no GPU here: {sees}. On a machine with an NVIDIA GPU: pip install 'jaxlm[cuda]'; --tiny tries the "
        "script at toy sizes on a CPU",
        file=sys.stderr,
    )
    sys.exit(2)


def fits(command: list[str], batch: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The lines that a command prints at the largest of batch, batch / 2, ... that fits, or why it printed none."""
    while True:
        done = subprocess.run([*command, f"--batch={batch}"], capture_output=True, text=True, env=environment)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        full = any(word in done.stderr for word in FULL)
        if done.returncode and full and batch > 1:
            batch //= 2
            continue
        if done.returncode:
            lines.append(dict(failed=(done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]))
        return [dict(batch=batch) | line for line in lines]


def peer(a: argparse.Namespace, name: str, shape: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The peer's train steps in bfloat16, eager and compiled."""
    from jaxlm import chips

    sizes = [f"--{key}={shape[key]}" for key in ("layers", "heads", "width", "context", "vocab")]
    command = [*a.peer.split(), "speed", *sizes, f"--repeats={a.repeats}", "--dtype=bfloat16", "--mode=eager,compile"]
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    chip, lines = chips.of(kind), fits(command, shape["batch"], environment)
    for line in lines:
        line["mfu"] = round(line["gflops"] * 1e9 / chip.flops, 4) if chip and "gflops" in line else None
    return [dict(what="train", model=name, **line) for line in lines]


def ours(a: argparse.Namespace, what: str, name: str, shape: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    """Our lines of one measurement, each in a fresh process."""
    command = [sys.executable, __file__, what, f"--model={name}", f"--variant={variant}", f"--repeats={a.repeats}"]
    command += [f"--prompt={a.prompt}", f"--new={a.new}"] + ["--tiny"] * a.tiny
    batch = int(variant) if what == "decode" else shape["batch"]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}  # by default JAX leaves a fourth to others
    return [dict(what=what, model=name, **line) for line in fits(command, batch, environment)]


def compare(name: str, mine: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of ours over the best of the peer's, in tokens/s and in model FLOP/s; None where either has none."""
    found: dict[str, Any] = dict(what="ratio", model=name)
    for key in ("tokens_per_s", "gflops"):
        best = [max((line[key] for line in lines if key in line), default=None) for lines in (mine, peers)]
        found[key] = None if None in best or not best[1] else round(best[0] / best[1], 3)
    return found


def main() -> None:
    """Measure, print a line each, and the ratios to the peer's best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="train, attention, decode; all unless given")
    parser.add_argument("--model", default="gpt2,llama")
    parser.add_argument("--peer", default="")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variant", default="")
    a = parser.parse_args()
    wanted, shapes, variants = a.what or [*WHAT], TINY if a.tiny else MODELS, FEW if a.tiny else VARIANTS
    names = a.model.split(",")
    for word, known in ((w, k) for ws, k in ((wanted, WHAT), (names, shapes)) for w in ws):
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}")
    if a.variant:
        for key, value in shapes[a.model].items():
            if key != "batch" or a.batch is None:
                setattr(a, key, value)
        print(json.dumps(WHAT[wanted[0]](a, a.variant)))
        return
    kind = device(a.tiny)
    print(json.dumps(dict(device=kind, tiny=a.tiny)), flush=True)

    def show(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in lines:
            print(json.dumps(line), flush=True)
        return lines

    for what in wanted:
        for name in names:
            shape = shapes[name]
            beside = what == "train" and a.peer
            peers = show(peer(a, name, shape, kind)) if beside else []
            mine = [line for variant in variants[what] for line in show(ours(a, what, name, shape, variant))]
            if beside:
                peers += show(peer(a, name, shape, kind))
                show([compare(name, mine, peers)])


if __name__ == "__main__":
    main()
