"""Word vectors in text files, as GloVe and word2vec publish them: initial embeddings for a tokenizer's words.

    the 0.418 0.24968 -0.41242 ...       a word and its values a line; word2vec's and fastText's have a line "count
    of 0.70853 0.57088 -0.4716 ...       width" in front. Plain, .gz or .zst

A word may hold blanks, as a few in GloVe's 840B do: what stands in front of the values is the word.
"""

from collections.abc import Iterator, Set
import math

from etils import epath
import numpy as np

from jaxlm.data import files
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.lookup import Mistake


def embeddings(tokenizer: Tokenizer, width: int, *, vectors: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens that the files of `vectors` (a path or glob) have a word for, and its vectors [ids, width].

    A token is the word that it decodes to, blanks around it aside, or else that word in lower case. So `the` has one
    vector within a word and at its beginning; specials, and bytes that are no character, have none. Of a word that
    comes twice the first vector counts; one of zeros says nothing, and is passed over. One line is held at a time, and
    the vectors that are wanted. Raises `Mistake` where a line is none, where its values are not `width`, and where no
    token is found.
    """
    words = {i: tokenizer.decode([i]).strip() for i in range(tokenizer.vocab)}
    spellings = {i: (w.encode(), w.lower().encode()) for i, w in words.items() if w and "\ufffd" not in w}
    wanted, known = {w for both in spellings.values() for w in both}, {}
    for name in files.match(vectors):
        for word, vector in _read(name, wanted, width):
            known.setdefault(word, vector)
    best = {i: known.get(exact, known.get(low)) for i, (exact, low) in spellings.items()}
    found = {i: vector for i, vector in best.items() if vector is not None}
    if not found:
        raise Mistake(f"{vectors}: none of the tokenizer's {tokenizer.vocab:,} tokens is a word of it")
    return np.fromiter(found, np.int32), np.stack([*found.values()])


def _read(name: epath.Path, wanted: Set[bytes], width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """The wanted words of a file and their vectors, without those of zeros."""
    first = True  # of the lines with a word
    with files.open(name) as stream:
        for number, line in enumerate(stream, 1):
            fields = line.split()
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                _check(name, int(fields[1]), width)
                continue
            last = len(fields) - 1 - width  # of the word's own fields
            if last < 0 or (last > 0 and _is_number(fields[last])):
                if first and fields:
                    _check(name, len(fields) - 1, width)
                values = max(len(fields) - 1, 0)
                raise Mistake(f"{name}, line {number}: {values} values, where the others have {width}")
            first = False
            word = fields[0] if last == 0 else b" ".join(fields[: last + 1])
            if word not in wanted:
                continue
            for field in fields[last + 1 :]:
                if not _is_number(field):
                    raise Mistake(f"{name}, line {number}: {field.decode(errors='replace')!r} is no number")
            vector = np.array([float(field) for field in fields[last + 1 :]], np.float32)
            if vector.any():
                yield word, vector


def _check(name: epath.Path, values: int, width: int) -> None:
    if values != width:
        raise Mistake(
            f"{name}: its vectors have {values} values, and the model's embeddings have {width}; "
            f"choose a file of {width}, or config.model.width={values}"
        )


def _is_number(field: bytes) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False
