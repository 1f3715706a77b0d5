"""not measured: published models at the batches of published runs, to be planned for TPUs before they are run.

    jaxlm plan --config=configs/tpu/published.py:llama3.1-8b --topology=v6e:16x16
    jaxlm plan --config=configs/tpu/published.py:llama3.1-405b --topology=v5p:8x8x8
    jaxlm plan --config=configs/tpu/published.py:llama3.1-405b-slices --topology=v6e:16x16
    jaxlm plan --config=configs/tpu/published.py:llama2-70b --topology=v5p:8x8x4
    jaxlm plan --config=configs/tpu/published.py:gpt3-175b --topology=v5p:8x8x8
    jaxlm plan --config=configs/tpu/published.py:mixtral-8x7b --topology=v5p:4x4x4
    jaxlm plan --config=configs/tpu/published.py:bert-large --topology=v5e:4x4
    jaxlm plan --config=configs/tpu/published.py:t5-xxl --topology=v5p:4x4x4
    jaxlm plan --config=configs/tpu/published.py:llama3.2-1b --topology=v5e:4x4 --search
    jaxlm plan --config=configs/tpu/published.py:gpt2-xl --topology=v5e:2x4 --mode=serve --rows=32 \\
               --config.mesh.fsdp=1 --config.mesh.data=8

What the plans say is in the README. The one of two slices has its weights split over both. To train one, name your own
text under config.prepare.sources.
"""

from ml_collections import ConfigDict

RUNS = {  # the model, tokens of its vocabulary, objective, length, rows in all and the mesh that they are on
    "llama3.1-8b": (dict(name="llama", size="llama3.1-8b"), 128_256, "clm", 8192, 3 * 256, dict(fsdp=256)),
    "llama3.1-70b": (dict(name="llama", size="llama3.1-70b"), 128_256, "clm", 8192, 256, dict(fsdp=256)),
    "llama3.1-405b": (dict(name="llama", size="llama3.1-405b"), 128_256, "clm", 8192, 512, dict(fsdp=64, tensor=8)),
    "llama3.1-405b-slices": (
        dict(name="llama", size="llama3.1-405b", remat="offload"), 128_256, "clm", 8192, 512,
        dict(data=2, fsdp=256, slices=2),
    ),
    "llama3.2-1b": (dict(name="llama", size="llama3.2-1b"), 128_256, "clm", 4096, 4 * 16, dict(fsdp=16)),
    "llama2-70b": (dict(name="llama", size="llama2-70b"), 32_000, "clm", 4096, 4 * 256, dict(fsdp=256)),
    "gpt2-xl": (dict(name="gpt2", size="gpt2-xl"), 50_257, "clm", 1024, 512, dict(fsdp=8)),
    "gpt3-175b": (dict(name="gpt2", size="gpt3-175b"), 50_304, "clm", 2048, 2 * 512, dict(fsdp=512)),
    "mixtral-8x7b": (dict(name="mixtral", size="8x7b"), 32_000, "clm", 4096, 4 * 64, dict(fsdp=64)),
    "bert-large": (dict(name="bert", size="bert-large"), 30_522, "mlm", 512, 32 * 16, dict(fsdp=16)),
    "t5-xxl": (dict(name="t5", size="t5-1.1-xxl"), 32_128, "span", 512, 16 * 64, dict(fsdp=64)),
    "tiny": (
        dict(name="llama", layers=1, width=32, heads=2, kv_heads=2, head_width=16, mlp_width=64), 512, "clm", 32, 2,
        dict(fsdp=1),
    ),
}  # fmt: skip


def get_config(size: str = "llama3.1-8b") -> ConfigDict:
    model, vocab, objective, length, batch, mesh = RUNS[size]
    c = ConfigDict()
    c.seed = 0
    c.steps = 2 if size == "tiny" else 100_000

    c.store = "data/your_text"
    c.prepare = dict(
        sources=dict(text="text:data/your_text/*.txt.gz"),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab=vocab),
        validation=0.01,
    )
    c.objective = dict(name=objective)
    c.length, c.batch = length, batch

    c.model = {"remat": "full", **model}
    c.mesh = {"data": 1, **mesh}
    if "slices" in mesh:
        c.rules = dict(D=("fsdp", "data"))
    c.optimizer = dict(name="adamw", lr=3e-4, schedule="cosine", warmup=2_000, weight_decay=0.1, clip=1.0)
    c.every = dict(log=10, eval=1_000, save=1_000)
    if size == "tiny":
        c.optimizer["warmup"] = 1
    return c
