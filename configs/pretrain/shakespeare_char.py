"""nanoGPT's character model of tinyshakespeare: GPT-2 of 0.8 M parameters.

    jaxlm prepare --config=configs/pretrain/shakespeare_char.py --config.prepare.sources.plays=text:PATH/input.txt
    jaxlm train --config=configs/pretrain/shakespeare_char.py --workdir=runs/shakespeare_char

The text is karpathy/char-rnn's data/tinyshakespeare/input.txt; its first 90 % train, the rest validates.

2 CPU cores with products of bfloat16, 76 s of training: validation loss over the whole validation text 1.756 (the same
model and learning rate in PyTorch: 1.748 in 90 s; nanoGPT publishes 1.88). With `--config.dtype=bfloat16` 1.763 in 57 s
(on one device 1.756, with seed 1 1.746, in 67 to 74 s; PyTorch: 1.752 and 1.765 in 85 and 89 s). With nanoGPT's own
learning rate, 1e-3, three seeds had 1.904, 1.899 and 1.887 (PyTorch: 1.889, 1.881, 1.905), with 2e-3 1.811 (1.798).
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 1337
    c.steps = {"full": 2_000, "tiny": 2}[size]

    c.store = "data/shakespeare_char"
    c.prepare = dict(
        sources=dict(plays="text:data/tinyshakespeare.txt"),
        tokenizer=dict(kind="characters"),
        validation=0.1,
        split="tail",
    )
    c.data = dict(packing="split", isolate=False)
    c.length, c.batch = 64, 12

    c.model = dict(name="gpt2", layers=4, heads=4, width=128, context=64)
    c.optimizer = dict(
        name="adamw", lr=4e-3, b1=0.9, b2=0.99, schedule="cosine", warmup=100, final=0.1, weight_decay=0.1, clip=1.0
    )
    c.every = dict(log=100, eval=1000, save=1000)
    c.samples = dict(prompts=["ROMEO:\n", "\nKING "], tokens=200)
    if size == "tiny":
        c.optimizer["warmup"] = 1
        c.samples = dict(prompts=["a"], tokens=4)
    return c
