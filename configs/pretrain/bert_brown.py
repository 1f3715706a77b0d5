"""A BERT of 1.0 M parameters with next-sentence pairs, on the Brown corpus.

    jaxlm prepare --config=configs/pretrain/bert_brown.py --config.prepare.sources.brown=jsonl:PATH/*.jsonl.gz
    jaxlm train --config=configs/pretrain/bert_brown.py --workdir=runs/bert_brown

The text is the Brown corpus (nltk_data's packages/corpora/brown.zip), a document a line.

2 CPU cores shared with other work, 11 min of training: masked tokens of held-out text cost 6.24, 6.09 and 6.06 nats
after 500, 1,000 and 1,500 steps; what the frequencies of tokens alone give is 6.60. Of the pairs 49.7, 64.3 and 71.8 %
are told right (chance: 50). On WikiText-2's validation text 6.31 nats and 54.9 %.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = {"full": 1_500, "tiny": 2}[size]

    c.store = "data/brown"
    c.prepare = dict(
        sources=dict(brown="jsonl:data/brown/*.jsonl.gz"),
        tokenizer=dict(kind="huggingface", algorithm="wordpiece", lowercase=True, vocab=4096),
        validation=0.05,
    )
    c.objective = dict(name="mlm", next="nsp")
    c.length, c.batch = 128, 32

    c.model = dict(name="bert", layers=2, width=128, heads=4, mlp_width=512, context=128)
    c.optimizer = dict(name="adamw", lr=1e-3, schedule="linear", warmup=100, final=0.0, weight_decay=0.01, clip=1.0)
    c.every = dict(log=50, eval=500, save=100)
    if size == "tiny":
        c.length, c.batch = 32, 2
        c.optimizer["warmup"] = 1
        c.model.update(width=32, heads=2, mlp_width=64)
    return c
