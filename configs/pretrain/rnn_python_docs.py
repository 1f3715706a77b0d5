"""An LSTM of 2 M parameters on the text that ships with every Python: a classical baseline (its time is not measured).

    jaxlm prepare --config=configs/pretrain/python_docs.py                  the same store
    jaxlm train --config=configs/pretrain/rnn_python_docs.py --workdir=runs/rnn_python_docs

2 CPU cores: 1.969, 1.816 and 1.736 bits per byte after 400, 800 and 1,200 steps, on held-out text of Python 3.11.7
(5-gram 1.828, 2-gram 2.081).
"""

from ml_collections import ConfigDict


def get_config(size: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = {"full": 1_200, "tiny": 2}[size]

    c.store = "data/python_docs"
    c.prepare = dict(
        sources=dict(docs="python-docs:"),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab=2048),
        validation=0.05,
        split_seed=4,  # as in python_docs.py: one store serves both
    )
    c.length, c.batch = 128, 16  # wide rather than long: a step has as many products in a row as a row has tokens

    c.model = dict(name="rnn", cell="lstm", layers=1, width=384, tied=True, dropout=0.2)
    c.optimizer = dict(name="muon", lr=3e-2, schedule="linear", warmup=50, final=0.0, weight_decay=0.1, clip=1.0)
    c.every = dict(log=50, eval=400, save=200)
    c.samples = dict(prompts=["The", "Return a", "class"], tokens=120)
    if size == "tiny":
        c.length, c.batch = 32, 2
        c.optimizer["warmup"] = 1
        c.model.update(width=32)
        c.samples = dict(prompts=["The"], tokens=4)
    return c
