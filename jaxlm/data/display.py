"""Show examples as the model gets them: its tokens piece by piece, what is hidden, what is asked for.

    console.print(Display(tokenizer).example(task.features(row, rng)))

      tokens  [1]<bos>the[ cat→<mask>] sat[2]<bos>on 37 padding        a masked model: the label → what it is shown
      tokens  [1]<bos>the cat sat                                      a causal model: what it predicts is in green

Segments have backgrounds in turns, and neighbouring pieces two shades, so that one sees where one ends.
"""

from collections.abc import Mapping

import numpy as np
from rich.text import Text

from jaxlm.data.tokenizers import Tokenizer

GROUNDS = ("on grey15", "on dark_blue")  # of the segments, in turns
SHADES = ("bright_white", "white")  # of neighbouring pieces that nothing is asked about
ASKED, HIDDEN, MARK = ("bright_green", "green"), "bold yellow", "dim cyan"
SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
LEGEND = Text.assemble(
    ("[1] ", MARK), "a segment begins   ", ("piece", ASKED[0]), " it has to predict   ",
    (" label→shown ", HIDDEN), " hidden from it   ", ("piece", SHADES[0]), " only read",
)  # fmt: skip


class Display:
    """Turns examples into coloured text."""

    def __init__(self, tokenizer: Tokenizer):
        names = {i: name for name, i in tokenizer.specials.items()}
        self._pieces = [
            piece.translate(SIGNS) or names.get(i) or f"<{i}>" for i, piece in enumerate(tokenizer.pieces())
        ]

    def example(self, example: Mapping[str, np.ndarray]) -> Text:
        """One example, a line for each sequence in it, and the arrays of another form in words."""
        shown: set[str] = set()
        out = Text()
        for tokens, segments in (("tokens", "segments"), ("decoder_tokens", "decoder_segments")):
            if tokens not in example:
                continue
            read = example[tokens]
            segments_T = example.get(segments, np.ones_like(read))
            asked = _asked(read, example, "decoder_tokens" not in example or tokens == "decoder_tokens")
            out.append(f"{tokens.replace('_', ' '):>15}  ", "bold").append_text(self._line(read, segments_T, *asked))
            out.append("\n")
            shown |= {tokens, segments}
        for name in sorted(set(example) - shown - {"labels", "weights"}):
            values = np.array2string(example[name], threshold=12, separator=" ", precision=3)
            out.append(f"{name.replace('_', ' '):>15}  ", "bold").append(values.replace("\n", "") + "\n", "dim")
        return out

    def _line(self, tokens: np.ndarray, segments: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> Text:
        """One sequence; `labels` are what is asked for at each place, where `asked`."""
        line, before = Text(), 0
        for i in range(len(tokens)):
            segment = int(segments[i])
            if not segment and not asked[i]:
                continue
            ground = GROUNDS[segment % 2]
            if segment != before:
                line.append(f"[{segment}]", f"{MARK} {ground}")
                before = segment
            piece = self._pieces[tokens[i]]
            if asked[i] and labels[i] != tokens[i]:
                line.append(f"[{self._pieces[labels[i]]}→{piece}]", f"{HIDDEN} {ground}")
            else:
                line.append(piece, f"{(ASKED if asked[i] else SHADES)[i % 2]} {ground}")
        if padding := int(((segments == 0) & ~asked).sum()):
            line.append(f" {padding} padding", "dim")
        return line


def _asked(tokens: np.ndarray, example: Mapping[str, np.ndarray], labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    """What is asked for at each place of a sequence, and where anything is.

    A model that reads its own labels one place later (causal, a decoder) is asked for the tokens themselves; the last
    label has no such place, and where it counts it stands in none of them.
    """
    if not labelled:
        return tokens, np.zeros(len(tokens), bool)
    labels, asked = example["labels"], example["weights"] > 0
    later = asked[:-1]
    if labels.shape == tokens.shape and later.any() and (labels[:-1] == tokens[1:])[later].mean() > 0.5:
        return tokens, np.append(False, later)
    return labels, asked
