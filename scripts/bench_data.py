"""Measurements of the data path, for `scripts/bench.py loader` and `scripts/bench.py prepare`."""

import argparse
import functools
import json
import os
import resource
import statistics
import time
from typing import Any

from jaxlm import lookup

VARIANTS = {
    "loader": [
        f"{name}:{where}:{threads}"
        for name in lookup.names("jaxlm.objectives")
        for where in ("held", "disk")
        for threads in (0, 1, 4)
    ],
    "prepare": ["1", "2", *(f"{kind}:{workers}" for kind in ("sentencepiece", "huggingface") for workers in (1, 2))],
}


def _write_store(folder: str, vocab: int) -> None:
    """48 M random tokens in two sources, of documents of about 650 and of 4,900 tokens."""
    import numpy as np

    from jaxlm.data import store

    rng = np.random.default_rng(0)
    for source, size in dict(short=6, long=8).items():
        writer = store.Writer(f"{folder}/{source}", "uint16")
        for _ in range(24):
            lengths = np.clip(rng.lognormal(size, 1, 1 << 14).astype(int), 2, 1 << 15)
            lengths = lengths[np.cumsum(lengths) <= 1 << 20]
            tokens = (rng.zipf(1.3, lengths.sum()) % vocab).astype(np.uint16)
            writer.append("train", tokens, lengths, 4 * lengths)
            splits = writer.commit()
        store.write_json(f"{folder}/{source}/manifest.json", dict(splits=splits, vocab=vocab))


def loader(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Batches from a store of 48 M tokens in two sources, packed by best fit; and where the time of a row goes (µs).

    `held`: decoded in memory, as splits of that size are; `disk`: from compressed chunks, as larger ones are, of which
    the cache holds two thirds.
    """
    import itertools
    import tempfile

    import numpy as np

    from jaxlm import objectives
    from jaxlm.data import rows
    from jaxlm.data import store as stores
    from jaxlm.data.words import Words

    name, where, threads = variant.split(":")
    kind = lookup.module("jaxlm.objectives", name).KINDS[0]
    try:
        task = objectives.of(dict(name=name), length=a.context, words=Words.of_size(a.vocab), kind=kind)
    except lookup.Mistake as e:  # more spans in a row than the stand-in for a tokenizer has sentinels
        return dict(objective=name, refused=str(e))
    stores.HELD = stores.HELD if where == "held" else 0
    with tempfile.TemporaryDirectory() as folder:
        _write_store(folder, a.vocab)
        stream = rows.train(store := stores.open(folder), length=task.row, seed=0, cost=task.cost)
        count = max(256, (1 << 23) // a.context)  # rows

        def cost(what) -> float:
            for i in range(32):
                what(i)
            start = time.process_time()
            for i in range(count):
                what(i)
            return round((time.process_time() - start) / count * 1e6, 1)

        split, noise = store.split("short", "train"), np.random.default_rng(0)
        packed = rows.Rows(split, rows.best_fit(split.offsets, task.row))
        some = [packed[i] for i in range(64)]
        spent = dict(
            read=cost(lambda i: split.read(i * task.row, (i + 1) * task.row)),
            row=cost(lambda i: packed[i * 7919 % len(packed)]),
            stream=cost(lambda i: stream[i]),
            features=cost(lambda i: task.features(some[i % 64], noise)),
        )
        seed = None if task.exact else 0
        batches = rows.batches(stream, batch=a.batch, features=task.features, seed=seed, threads=int(threads))
        for _ in itertools.islice(batches, 8):
            pass
        start, cpu, steps = time.perf_counter(), time.process_time(), count // a.batch
        for _ in itertools.islice(batches, steps):
            pass
        took, cpu = (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps
    return dict(
        objective=name, store=where, threads=int(threads), context=a.context, batch=a.batch,
        tokens_per_s=round(a.batch * a.context / took), rows_per_s=round(a.batch / took),
        batch_ms=round(took * 1e3, 3), batch_cpu_ms=round(cpu * 1e3, 3), row_us=spent,
    )  # fmt: skip


def prepare(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    """`jaxlm prepare` on generated text with so many workers; "KIND:WORKERS" is encoding alone, beside its library."""
    import random
    import tempfile

    from jaxlm import prepare as programs
    from jaxlm.data import augmentation, pipeline, sources, store, tokenizers
    from jaxlm.data.cleaning import Cleaner
    from jaxlm.data.dedup import Dedup

    docs = [document.text for document in sources.find("python-docs:").read()]

    def texts():
        rng, size, latest = random.Random(0), 0, []
        known = [sentence for text in docs for sentence in augmentation.sentences(text) if len(sentence) > 20]
        while size < a.megabytes * 1e6:  # a tenth are duplicates, of these a half with one sentence changed
            parts = rng.choices(known, k=max(3, int(rng.lognormvariate(3, 0.7))))
            if latest and rng.random() < 0.1:
                parts = list(rng.choice(latest))
                if rng.random() < 0.5:
                    parts[rng.randrange(len(parts))] = rng.choice(known)
            latest = [*latest[-999:], parts]
            yield "".join(parts)
            size += len("".join(parts).encode())

    kind, _, workers = variant.rpartition(":")
    os.environ["RAYON_NUM_THREADS"] = workers  # of the library, before it first works
    spec = dict(kind=kind or "sentencepiece", algorithm="bpe", vocab=8192)
    if kind:
        return dict(tokenizer=kind, **alone(a, tokenizers.train(docs, spec), list(texts()), int(workers)))

    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            try:
                return inner(*args, **more)
            finally:
                spent[stage] = spent.get(stage, 0) + time.perf_counter() - begun

        setattr(owner, name, outer)

    with tempfile.TemporaryDirectory() as folder:
        tokenizers.train(docs, spec).save(f"{folder}/tok")
        with open(f"{folder}/docs.jsonl", "w") as file:
            file.writelines(json.dumps(dict(text=text), ensure_ascii=False) + "\n" for text in texts())
            size = file.tell() / 1e6
        tokenizer = dict(kind="sentencepiece", path=f"{folder}/tok/tokenizer.model")
        if workers == "1":
            for owner, name, stage in (
                (Cleaner, "__call__", "clean"), (Dedup, "digest", "dedup"), (Dedup, "signature", "dedup"),
                (pipeline, "decide", "dedup"), (pipeline, "_write_part", "dedup"),
                (lookup.module("jaxlm.data.tokenizers", "sentencepiece").Tokenizer, "encode_batch", "tokenize"),
                (store.Writer, "append", "write"), (store.Writer, "commit", "write"),
            ):  # fmt: skip
                timed(owner, name, stage)
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = programs.prepare(
            f"{folder}/store", dict(docs=f"jsonl:{folder}/docs.jsonl"), tokenizer, workers=int(workers),
            clean=["unicode", "gopher"], dedup=dict(near=0.8),
        )  # fmt: skip
        took = time.perf_counter() - begun
        manifest = made.manifest("docs")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(
        mb=round(size), workers=int(workers), seconds=round(took, 1),
        mb_per_s_per_core=round(size / took / int(workers), 2),
        shares={stage: round(seconds / took, 3) for stage, seconds in spent.items()},
        kept=manifest["splits"]["train"]["documents"], duplicates=manifest["duplicates"],
        peak_mb=peak // 1024, before_mb=before // 1024,
    )  # fmt: skip


def alone(a: argparse.Namespace, tok: Any, texts: list[str], workers: int) -> dict[str, Any]:
    """MB/s of encoding texts as `jaxlm prepare` does and as the tokenizer's library does, in turns; medians."""
    from jaxlm.data import encode, pipeline, splits
    from jaxlm.data.augmentation import Augmentation
    from jaxlm.data.sources import Document

    work = functools.partial(encode.encode, tok, pipeline.Pipeline.of(splits.Splitter("document", 0)).parts)
    work = functools.partial(work, Augmentation())
    times: dict[str, list[float]] = dict(ours=[], library=[])
    for _ in range(max(3, a.repeats // 5)):
        begun = time.perf_counter()
        documents = (splits.Marked(Document(text, 0, len(text)), None) for text in texts)
        tokens = sum(len(part.tokens) for _, done in encode.ordered(work, documents, workers) for part in done.parts)
        middle = time.perf_counter()
        if hasattr(tok, "_processor"):
            found = tok._processor.encode(texts, num_threads=workers)
        else:
            found = [encoding.ids for encoding in tok._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        times["ours"].append(middle - begun)
        times["library"].append(time.perf_counter() - middle)
        assert tokens == sum(map(len, found)) + len(texts) * (tok.add_bos + tok.add_eos)
        del found
    size = sum(len(text.encode()) for text in texts) / 1e6
    rates = {who: size / statistics.median(took) for who, took in times.items()}
    ratio = rates["ours"] / rates["library"]
    return dict(workers=workers, **{who: round(rate, 2) for who, rate in rates.items()}, ratio=round(ratio, 3))
