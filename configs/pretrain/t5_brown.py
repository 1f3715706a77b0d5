"""T5 of 2.2 M parameters fills gaps in the Brown corpus, read as bytes, better than a 5-gram.

    jaxlm prepare --config=configs/pretrain/t5_brown.py --config.prepare.sources.brown="jsonl:PATH?field=text"
    jaxlm train --config=configs/pretrain/t5_brown.py --config.dtype=bfloat16 --workdir=runs/t5_brown
    python -m scripts.span_baseline --workdir=runs/t5_brown

The text is the Brown corpus (nltk_data's packages/corpora/brown.zip), a document a line; bytes are tokens as in ByT5
(arXiv:2105.13626). Rows are so short that they have two gaps: a decoder that has two sentinels to look for in the
source finds them within 500 steps. With eight it does not within thousands, and so learns only what stands in a gap
before, whatever the tokens are (experiments/LOG.md).

2 CPU cores that multiply bfloat16s, with much other work and long pauses, 83 min of training: 1.53, 1.38, 1.30, 1.25,
1.21, 1.17, 1.14, 1.12, 1.09, 1.07, 1.04, 1.02, 1.00 and 0.99 nats a token of the answers, sentinels included, after
1,000, 2,000, ... 14,000 steps. Of 45,175 held-out bytes in gaps 1.37 nats each, and 58.4 % of them right;
a 5-gram that knows what stands on the left has 1.43. Told where gaps end, as 5-grams are, the model has 1.33, and the
even mixture of a 5-gram from the left and one from the right 1.32.
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = {"full": 14_000, "tiny": 2}[size]

    c.store = "data/brown_bytes"
    c.prepare = dict(
        sources=dict(brown="jsonl:data/brown/train.jsonl.gz?field=text"),
        tokenizer=dict(kind="bytes", extra=[f"<extra_id_{i}>" for i in range(100)]),
        validation=0.05,
    )
    c.length, c.batch = 40, 64

    c.objective = dict(name="span", rate=0.15)
    c.model = dict(name="t5", layers=2, width=192, heads=6, head_width=32, mlp_width=512)
    # T5 does not divide its scores, so Muon, whose steps do not follow a weight's size, moves them too far (LOG.md)
    c.optimizer = dict(name="adafactor", lr=2e-2, schedule="linear", warmup=50, final=0.0, clip=1.0)
    c.guard = dict(factor=1e9)  # gradients rise where the plateau ends
    c.every = dict(log=50, eval=1_000, save=1_000)
    c.samples = dict(prompts=["He had g<extra_id_0> to the h<extra_id_1>"], tokens=24)
    if size == "tiny":
        c.batch = 2
        c.optimizer["warmup"] = 1
        c.model.update(layers=1, width=32, heads=2, head_width=16, mlp_width=64)
        c.samples = dict(prompts=["The <extra_id_0> of"], tokens=4)
    return c
