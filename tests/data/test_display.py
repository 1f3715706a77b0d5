"""What is shown of an example is what the model gets: pieces, segments, what is hidden and what is asked for."""

import numpy as np
import pytest
from rich.console import Console

from jaxlm.data import tokenizers
from jaxlm.data.display import ASKED, GROUNDS, HIDDEN, Display

TOKENIZER = tokenizers.train([], dict(kind="bytes", extra=["<mask>"]))
BOS, MASK = TOKENIZER.bos, TOKENIZER.specials["<mask>"]


def arrays(**values):
    return {name: np.array(value) for name, value in values.items()}


def show(**values):
    return Display(TOKENIZER).example(arrays(**values))


def styles(text):
    """The text with the style of each stretch."""
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_a_causal_models_targets_are_its_own_tokens_one_place_on():
    a, b, c = b"abc"
    text = show(tokens=[BOS, a, b, BOS, c, 0], labels=[a, b, 0, c, 0, 0], weights=[1, 1, 0, 1, 0, 0],
                segments=[1, 1, 1, 2, 2, 0])  # fmt: skip
    assert text.plain.strip() == "tokens  [1]<s>ab[2]<s>c 1 padding"
    found = dict(styles(text))
    assert {found[piece].split()[0] for piece in "abc"} <= set(ASKED) and found["<s>"].split()[0] not in ASKED
    assert found["a"].endswith(GROUNDS[1]) and found["c"].endswith(GROUNDS[0]), "segments differ in their background"


def test_what_is_hidden_from_a_masked_model_stands_beside_what_it_is_shown():
    a, b, c = b"abc"
    text = show(tokens=[BOS, MASK, b, c], labels=[0, a, b, 0], weights=[0, 1, 1, 0], segments=[1, 1, 1, 1])
    assert text.plain.strip() == "tokens  [1]<s>[a→<mask>]bc"
    found = dict(styles(text))
    assert found["[a→<mask>]"].startswith(HIDDEN) and found["b"].split()[0] in ASKED, "b is asked for and not hidden"
    assert found["c"].split()[0] not in ASKED


def test_both_sides_of_an_encoder_decoder_are_shown_and_what_else_there_is():
    a, b, c = b"a\nc"
    text = show(tokens=[a, MASK], segments=[1, 1], decoder_tokens=[BOS, b, c], decoder_segments=[1, 1, 1],
                labels=[b, c, 0], weights=[1, 1, 0], order=1)  # fmt: skip
    lines = [line.strip() for line in text.plain.splitlines()]
    assert lines == ["tokens  [1]a<mask>", "decoder tokens  [1]<s>↵c", "order  1"]
    assert dict(styles(text))["↵"].split()[0] in ASKED and dict(styles(text))["a"].split()[0] not in ASKED


@pytest.mark.parametrize("colors", ["truecolor", "standard", None])
def test_it_can_be_read_on_any_terminal(colors):
    console = Console(color_system=colors, width=40, force_terminal=True, record=True)
    console.print(show(tokens=[BOS, MASK], labels=[0, 97], weights=[0, 1], segments=[1, 1]))
    assert "[1]<s>[a→<mask>]" in console.export_text()
