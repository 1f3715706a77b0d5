"""not measured: A small ELECTRA on the Brown corpus: its generator has one layer, and the model two.

jaxlm prepare --config=configs/pretrain/bert_brown.py                  the same store
jaxlm train --config=configs/pretrain/electra_brown.py --workdir=runs/electra_brown
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = {"full": 1_200, "tiny": 2}[size]

    c.store = "data/brown"
    c.prepare = dict(  # as in bert_brown.py: one store serves both
        sources=dict(brown="jsonl:data/brown/*.jsonl.gz"),
        tokenizer=dict(kind="huggingface", algorithm="wordpiece", lowercase=True, vocab=4096),
        validation=0.05,
    )
    c.objective = dict(name="electra")
    c.length, c.batch = 64, 32

    c.model = dict(name="modernbert", layers=3, width=128, heads=4, mlp_width=256, context=128, every=1, generator=1)
    c.optimizer = dict(name="muon", lr=1e-2, schedule="linear", warmup=100, final=0.0, weight_decay=0.1, clip=1.0)
    c.every = dict(log=50, eval=250, save=250)
    if size == "tiny":
        c.length, c.batch = 32, 2
        c.optimizer["warmup"] = 1
        c.model.update(width=32, heads=2, mlp_width=64)
    return c
