"""A mixture of denoisers, each announced by a mode token in front of the source (arXiv:2205.05131, section 3.1).

    a document       [5 6 7 8 9 2]                 eos 2, <extra_id_0> 90, [NLU] 81, [S2S] 82, [NLG] 83
    R, regular       [81 5 90 8 9 2]  [90 6 7 2]   `span` with few and short gaps, as T5's
    S, sequential    [82 5 6 7 8 2]   [9 2]        `prefix`, whose target is a quarter of the text on average
    X, extreme       [83 5 90 9 2]    [90 6 7 8 2] `span` with long gaps, or many

All documents of a row have one denoiser, of the seven in the paper's table 1, drawn by `shares`. A row is as long as
for a regular denoiser (3 tokens, 15 %), whose sources then fill `length`; a text whose prefix is longer than that, or
its target than any other denoiser's, gives up one end. Short documents are packed by what R and X need (`span.cost`).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs, span
from jaxlm.objectives._pairs import Sheet
from jaxlm.objectives._pairs import loss as loss

KINDS = ("encoder-decoder", "decoder")
EXACT = False

MODES = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
SPANS = {  # mean length of a span in tokens, share of noise
    "R": [(3.0, 0.15), (8.0, 0.15)],
    "X": [(3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5)],
}
SHARES = (2.0, 1.0, 4.0)  # of R, S and X: every denoiser as often as the others


def row(length: int, words: Words, *, shares: Sequence[float] = SHARES, kind: str = "encoder-decoder") -> int:
    """As many tokens as span corruption takes, with room for a mode token."""
    given = list(shares)
    if len(given) != 3 or not all(isinstance(x, int | float) and x >= 0 for x in given) or not sum(given):
        raise Mistake(f"config.objective.shares={shares!r}: three numbers from 0 up, for R, S and X, not all 0")
    for name in MODES.values():
        words.find("mode", [name])
    tokens = span.row(length - 1, words, kind=kind)
    span.enough(words, max(spans for _, spans in _counts(tokens)))
    return tokens


def cost(tokens: np.ndarray, length: int, words: Words, *, kind: str = "encoder-decoder") -> np.ndarray:
    """How many of a row's tokens documents of so many take, by the denoiser that needs the most room for them."""
    longest = row(length, words, kind=kind)
    found = [span.sizes(tokens, words, rate, mean) for some in SPANS.values() for mean, rate in some]
    room = length, 1 + max(map(sum, _counts(longest)))
    return _pairs.cost(tokens, longest, [(source + 1, target) for source, target in found], room, kind)


def _counts(tokens: int) -> list[tuple[int, int]]:
    """Tokens of noise and spans of so many tokens, by each denoiser that has spans."""
    found = (span.counts(np.array(tokens), rate, mean) for some in SPANS.values() for mean, rate in some)
    return [(int(noise), int(spans)) for noise, spans in found]


def features(
    row: Mapping[str, np.ndarray], rng: np.random.Generator, words: Words, length: int, *,
    shares: Sequence[float] = SHARES, kind: str = "encoder-decoder",
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row -> its documents as pairs by one denoiser, as one example."""
    targets = 1 + max(map(sum, _counts(len(row["tokens"]))))
    sheet = Sheet(kind, length, targets, words)
    denoiser = list(MODES)[rng.choice(3, p=np.array(shares) / sum(shares))]
    front = [words.find("mode", [MODES[denoiser]])]
    mean, rate = SPANS[denoiser][rng.integers(len(SPANS[denoiser]))] if denoiser in SPANS else (0.0, 0.0)
    for document in _pairs.shuffled(_pairs.documents(row, words), rng):
        if denoiser == "S":
            _continue(sheet, document, rng, front)
        else:
            span.corrupt(sheet, document, rng, words, rate=rate, span=mean, front=front)
    return sheet.example()


def _continue(sheet: Sheet, document: np.ndarray, rng: np.random.Generator, front: list[int]) -> None:
    """Add a document whose last tokens are the target: from one to half of them, as likely as each other."""
    share = rng.random() / 2
    answer = lambda tokens: np.maximum(1, np.round(share * tokens)).astype(int)  # noqa: E731

    def sizes(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.arange(1, len(document) + 1)
        target = answer(tokens)
        return np.where(tokens < 2, span.NEVER, len(front) + tokens - target + 1), target + 1

    document = sheet.cut(document, rng, sizes)
    if len(document) > 1:
        at = len(document) - int(answer(len(document)))
        sheet.add(np.concatenate([front, document[:at]]), document[at:])
