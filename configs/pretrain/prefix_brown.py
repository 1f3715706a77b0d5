"""A Llama of 2.2 M parameters that reads a prefix of a text both ways and writes what follows, on the Brown corpus.

    jaxlm prepare --config=configs/pretrain/prefix_brown.py --config.prepare.sources.brown="jsonl:PATH?field=text"
    jaxlm train --config=configs/pretrain/prefix_brown.py --workdir=runs/prefix_brown

The text is the Brown corpus (nltk_data's packages/corpora/brown.zip), a document a line.

2 CPU cores shared with other work, 4 min 40 s of training: 4.95 nats a held-out token behind the prefix after 350
steps, 4.58 after 700 (perplexity 97.4, 15.4 % right).
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = {"full": 700, "tiny": 2}[size]

    c.store = "data/brown_text_to_text"  # as in ul2_brown.py: one store serves both
    c.prepare = dict(
        sources=dict(brown="jsonl:data/brown/train.jsonl.gz?field=text"),
        tokenizer=dict(
            kind="sentencepiece", algorithm="bpe", vocab=2048,
            extra=["<mask>", "[NLU]", "[S2S]", "[NLG]", *(f"<extra_id_{i}>" for i in range(100))],
        ),
        validation=0.05,
    )  # fmt: skip
    c.length, c.batch = 128, 8

    c.objective = dict(name="prefix")
    c.model = dict(name="llama", layers=4, width=192, heads=6, kv_heads=6, head_width=32, mlp_width=512, tied=True)
    c.optimizer = dict(name="muon", lr=1e-2, schedule="linear", warmup=50, final=0.0, weight_decay=0.1, clip=1.0)
    c.every = dict(log=50, eval=350, save=350)
    c.samples = dict(prompts=["He said that he had"], tokens=24)
    if size == "tiny":
        c.length, c.batch = 48, 2
        c.optimizer["warmup"] = 1
        c.model.update(layers=1, width=32, heads=2, kv_heads=2, head_width=16, mlp_width=64)
        c.samples = dict(prompts=["The"], tokens=4)
    return c
