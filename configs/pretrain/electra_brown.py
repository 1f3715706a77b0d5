"""An ELECTRA of 1.2 M parameters on the Brown corpus: of ModernBERT's layers one is the generator, three the model.

    jaxlm prepare --config=configs/pretrain/bert_brown.py --config.prepare.sources.brown=jsonl:PATH/*.jsonl.gz
    jaxlm train --config=configs/pretrain/electra_brown.py --workdir=runs/electra_brown

The text is the Brown corpus (nltk_data's packages/corpora/brown.zip), a document a line; the store is bert_brown.py's.

2 CPU cores with much other work, 10 min of training: the generator's masked tokens of held-out text cost 6.57, 6.07,
5.75, 5.45 and 5.32 nats after 250, 500, 750, 1,000 and 1,200 steps, and 14.6 % are found; what the frequencies of
tokens alone give is 6.60. To tell guesses from the text's own tokens costs the model 0.425, 0.421, 0.418, 0.413 and
0.410 nats a token, where their share alone, one in seven, gives 0.417: it has begun to, and names none of them yet.
BERT's layers, whose positions are learned, stay at the frequencies of either for as long (6.67 after 500).
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
