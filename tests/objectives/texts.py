"""Made-up documents, and what a text-to-text example holds: shared by the tests of objectives."""

import numpy as np

from jaxlm.data.words import Words

PAD, UNKNOWN, BOS, EOS, MASK, PRE, SUF, MID = range(8)
MODES = dict(zip(("[NLU]", "[S2S]", "[NLG]"), range(8, 11)))
SENTINELS = list(range(11, 111))
FIRST, STOP, VOCAB = 112, 111, 300  # ids of text; 111 is a full stop

names = dict(zip(("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"), range(8)))
names |= MODES | {f"<extra_id_{i}>": token for i, token in enumerate(SENTINELS)}
_text = np.arange(VOCAB) >= STOP
WORDS = Words(
    special_V=~_text, opens_V=_text, closes_V=_text, stops_V=np.arange(VOCAB) == STOP, specials=names, bos=BOS, eos=EOS,
    pad=PAD,
)  # fmt: skip


def text(length, seed=0, *, bos=False, eos=False, unknown=False):
    """So many tokens, some of them full stops, and perhaps unknown ones inside."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(length) < 0.1, STOP, rng.integers(FIRST, VOCAB, length))
    if unknown and length > 6:
        tokens[rng.integers(1, length)] = UNKNOWN
    return np.array([*[BOS] * bos, *tokens, *[EOS] * eos])


def pack(documents, length, isolate=True):
    """As many of the documents as fit, in one row."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segments")}
    at = 0
    for number, document in enumerate(documents, 1):
        document = document[: length - at]
        row["tokens"][at : at + len(document)] = document
        row["segments"][at : at + len(document)] = number if isolate else 1
        at += len(document)
    return row


def pairs(example):
    """The sources and targets of an example, as lists."""
    found = []
    for segment in range(1, example["segments"].max() + 1):
        here = example["segments"] == segment
        if "decoder_tokens" in example:
            there = example["decoder_segments"] == segment
            answer = example["labels"][there].tolist()
            assert example["decoder_tokens"][there].tolist() == [PAD, *answer[:-1]]
            assert (example["weights"][there] == 1).all()
        else:
            answer = example["labels"][here & (example["weights"] > 0)].tolist()
            whole = [*example["tokens"][here].tolist(), EOS] if example["tokens"][here][-1] != EOS else None
            read = whole or example["tokens"][here].tolist()
            found.append((read[: len(read) - len(answer)], answer))
            continue
        found.append((example["tokens"][here].tolist(), answer))
    return found


def restored(source, target):
    """The text of a pair of span corruption, specials inside it included: the target's spans in their gaps."""
    spans, body = {}, []
    for token in target[:-1]:
        if token in SENTINELS:
            assert token == SENTINELS[len(spans)], "in order, each once"
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    for token in source[:-1]:
        body += spans.pop(token) if token in SENTINELS else [token]
    assert all(not span for span in spans.values()), "each gap is filled; a text may end after the last"
    return body
