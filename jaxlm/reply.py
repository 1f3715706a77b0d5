"""Continuations while their tokens come in: `Row` keeps token ids, `Reply` makes text of them and finds its end."""

from collections.abc import Callable

from jaxlm.data.tokenizers import Tokenizer


class Row:
    """A continuation of token ids while they come in."""

    def __init__(self):
        self._tokens: list[int] = []

    def add(self, new: list[int]) -> bool:
        self._tokens += new
        return False

    def finish(self) -> list[int]:
        return self._tokens


class Reply:
    """The text of one continuation while its tokens come in, decoded behind its prompt, on which spaces may depend.

    Held back from `stream` is what later tokens may change: half a character, and what may begin a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: list[str], stream: Callable[[str], object] | None = None
    ):
        self.text = ""
        self._tokenizer, self._stop, self._stream = tokenizer, stop, stream
        self._tokens, self._before, self._sent = list(prompt), len(tokenizer.decode(prompt)), 0

    def add(self, new: list[int]) -> bool:
        """Take more tokens; whether the text has ended, before a stop string."""
        self._tokens += new
        text = self._tokenizer.decode(self._tokens)[self._before :]
        ends = [text.index(stop) for stop in self._stop if stop in text]
        self.text = text[: min(ends)] if ends else text
        self._send(len(self.text) if ends else len(text) - self._held(text))
        return bool(ends)

    def finish(self) -> str:
        """Send what was held back; returns the whole text."""
        self._send(len(self.text))
        return self.text

    def _held(self, text: str) -> int:
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(len(text) - len(text.rstrip("\ufffd")), *begun, 0)

    def _send(self, upto: int) -> None:
        if self._stream and upto > self._sent:
            self._stream(self.text[self._sent : upto])
            self._sent = upto
