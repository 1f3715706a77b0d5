"""Span corruption: a sentinel stands for each gap in the text, and the answer fills the gaps (arXiv:1910.10683, 3.1.4).

    a document   [5 6 7 8 9 2]                       eos 2, <extra_id_0> 90, <extra_id_1> 91
    noise         . x x . x                          about `rate` of the tokens, in spans of `span` tokens on average
    source       [5 90 8 91 2]
    target       [90 6 7 91 9 2]

`_pairs` shows how pairs of a source and a target become an example. A row holds as many tokens as fill `length` exactly
when their gaps have become sentinels, and the targets are as long as what those gaps hold: of 568 tokens, 512 and 114.
Several short documents need more than one text of their length, an eos each on either side; so they are packed by what
they need (`cost`), and a row then holds fewer tokens, of which none is left out. T5 corrupts whatever documents fall
into a row as one text; here each is corrupted as T5 corrupts a text, and only with config.data.isolate=False all of a
row as one. Specials inside a text are never noise: a span that meets one is two.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.data.words import Words
from jaxlm.lookup import Mistake
from jaxlm.objectives import _pairs
from jaxlm.objectives._pairs import Sheet
from jaxlm.objectives._pairs import loss as loss

KINDS = ("encoder-decoder", "decoder")
EXACT = False

NEVER = 1 << 30  # tokens: finds no room


def counts(tokens: np.ndarray, rate: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """How many of so many tokens are noise, and in how many spans: neither none nor all."""
    noise = np.clip(np.round(tokens * rate), 1, np.maximum(tokens - 1, 1)).astype(int)
    return noise, np.clip(np.round(noise / span), 1, np.maximum(tokens - noise, 1)).astype(int)


def row(
    length: int, words: Words, *, rate: float = 0.15, span: float = 3.0, kind: str = "encoder-decoder"
) -> int:  # fmt: skip
    """The most tokens of one text that find room when corrupted.

    Raises `Mistake` for options out of their range, too few sentinels, and a tokenizer without eos.
    """
    _pairs.eos(words)
    _pairs.share("rate", rate)
    if not isinstance(span, int | float) or span < 1:
        raise Mistake(f"config.objective.span={span!r}: the mean length of a span, 1 token at least")
    tokens = np.arange(2, 4 * length + 4)
    noise, spans = counts(tokens, rate, span)
    source, target = tokens - noise + spans + 1, noise + spans + 1
    fits = source + target <= length + 1 if kind == "decoder" else source <= length
    if not fits.any():
        raise Mistake(f"config.length={length} is too short for span corruption")
    last = np.flatnonzero(fits)[-1]
    enough(words, int(spans[last]))
    return int(tokens[last])


def cost(
    tokens: np.ndarray, length: int, words: Words, *, rate: float = 0.15, span: float = 3.0,
    kind: str = "encoder-decoder",
) -> np.ndarray:  # fmt: skip
    """How many of a row's tokens documents of so many take, so that all that are packed into it find room."""
    longest = row(length, words, rate=rate, span=span, kind=kind)
    room = length, targets(longest, rate, span)
    return _pairs.cost(tokens, longest, [sizes(tokens, words, rate, span)], room, kind)


def targets(tokens: int, rate: float, span: float) -> int:
    """The room for the targets of a row of so many tokens."""
    return 1 + int(sum(counts(np.array(tokens), rate, span)))


def sizes(tokens: np.ndarray, words: Words, rate: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of source and target of stored documents of so many tokens, of which a bos counts as text."""
    text = np.maximum(tokens - bool(words.tokenizer and words.tokenizer.add_eos), 1)
    noise, spans = counts(text, rate, span)
    return text - noise + spans + 1, noise + spans + 1


def enough(words: Words, spans: int) -> None:
    """Raise `Mistake` for a tokenizer with fewer sentinels than a full row has spans."""
    if spans > len(words.sentinels):
        raise Mistake(
            f"config.objective: a row of config.length has {spans} spans, and the tokenizer has "
            f"{len(words.sentinels)} sentinels. Train it with config.prepare.tokenizer.extra="
            f"[f'<extra_id_{{i}}>' for i in range({spans})], or make spans longer or config.length shorter"
        )


def features(
    row: Mapping[str, np.ndarray], rng: np.random.Generator, words: Words, length: int, *, rate: float = 0.15,
    span: float = 3.0, kind: str = "encoder-decoder",
) -> dict[str, np.ndarray]:  # fmt: skip
    """A packed row -> the corrupted documents as one example."""
    sheet = Sheet(kind, length, targets(len(row["tokens"]), rate, span), words)
    for document in _pairs.shuffled(_pairs.documents(row, words), rng):
        corrupt(sheet, document, rng, words, rate=rate, span=span)
    return sheet.example()


def corrupt(
    sheet: Sheet, document: np.ndarray, rng: np.random.Generator, words: Words, *, rate: float, span: float,
    front: Sequence[int] = (),
) -> None:  # fmt: skip
    """Add a document to the sheet, corrupted, with `front` before its source; or as much of one end as finds room."""
    sentinels, end = np.array(words.sentinels, int), 0
    while (text := ~words.special_V[document]).sum() >= 2:
        noise = np.zeros(len(document), bool)
        noise[text] = mask(int(text.sum()), rng, rate=rate, span=span)
        spans, between = (int(_first(where).sum()) for where in (noise, ~noise))  # a special may stand behind the last
        room = sheet.room(len(front) + int((~noise).sum()) + spans + 1, int(noise.sum()) + between + 1)
        spans = max(spans, between)
        if room >= 1 and spans <= len(sentinels):
            source, target = (gaps(document, where, sentinels) for where in (noise, ~noise))
            return sheet.add(np.concatenate([np.array(front, int), source]), target)
        end = end or int(rng.choice([1, -1]))
        kept = min(len(document) - 1, int(len(document) * min(room, len(sentinels) / spans)))
        document = document[::end][:kept][::end]


def mask(tokens: int, rng: np.random.Generator, *, rate: float, span: float) -> np.ndarray:
    """Which of so many tokens are noise, bool[tokens]: text and noise by turns, text first and noise last, each cut
    into spans in any way that is as likely as the others (T5's random_spans_noise_mask).
    """
    noise, spans = (int(n) for n in counts(np.array(tokens), rate, span))
    lengths = np.stack([_segmentation(tokens - noise, spans, rng), _segmentation(noise, spans, rng)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _segmentation(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths, 1 at least, of so many parts of the items."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def _first(noise: np.ndarray) -> np.ndarray:
    """Where each run of noise begins."""
    return noise & ~np.append(False, noise[:-1])


def gaps(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The tokens with one sentinel for each run of noise (T5's noise_span_to_unique_sentinel)."""
    first = _first(noise)
    number = np.cumsum(first) - 1
    return np.where(first, sentinels[np.maximum(number, 0)], tokens)[~noise | first]
