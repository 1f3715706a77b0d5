"""Augmentation, one file a kind: further texts made from a training text, or put in its place; validation has none.

    rules = Augmentation([dict(name="eda", copies=2), dict(name="noise", rate=0.1)])
    rules(["a dog barks", "it rains"])     (["a dog barks", "a barks dog", "dog barks", "a dgo barks", "it rains", ...],
                                           Counter(eda=3, noise=2))

Every rule works on the original text and takes `copies` (how many texts to make of each, 1), `keep` (False takes the
original out), `seed`, and its kind's own options. A text that came out as the original or as a copy before is left out;
an original of which nothing else came stays, whatever `keep` says. So does what is held out: only training text is
ever given to a rule.

A kind is a function `rule` of its options that returns a `Rule`. A kind whose `rule` takes `load` asks a model: it is
given `load(workdir)`, which returns a `Write`. A text's copies are a function of (seed, rule, text) alone, wherever it
stands; only the kinds in NEIGHBOURS look at the other texts of a batch, which is a function of the source.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import re
from typing import Any, Protocol

from etils import epath
import numpy as np

from jaxlm import lookup
from jaxlm.lookup import Mistake

NEIGHBOURS = ("mix",)
# After the end of a sentence and the blanks behind it, or after line ends. No branch tries a run of signs twice.
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))[^\S\n]+|\n\s*""")


class Rule(Protocol):
    """Makes up to `copies` new texts of each text, drawing with its generator."""

    def __call__(self, texts: list[str], rngs: list[np.random.Generator], copies: int) -> list[list[str]]: ...


class Write(Protocol):
    """What a model writes for each text: its `copies` likeliest texts; none for a text that it cannot read."""

    def __call__(self, texts: list[str], copies: int, *, beams: int, max_new_tokens: int) -> list[list[str]]: ...


class Augmentation:
    """The rules of a config, in their order; `load` gives the models that they ask for.

    Raises `Mistake` for an unknown kind or option, and for values that cannot be.
    """

    def __init__(self, specs: Sequence[str | Mapping[str, Any]] = (), load: Callable[[str], Write] | None = None):
        self._made, self._rules = (specs, load), []
        self.by_model = self.alone = False  # whether a model is asked; whether neighbours are left alone
        for number, spec in enumerate(specs):
            self._rules.append(_rule(f"config.prepare.augment[{number}]", number, _options(spec), load))
            self.by_model |= self._rules[-1].by_model
        self.alone = not self.by_model and not {rule.name for rule in self._rules} & set(NEIGHBOURS)
        self._keep = all(rule.keep for rule in self._rules)

    def __reduce__(self):
        return Augmentation, self._made  # another process makes its own; a model does not travel

    def __bool__(self) -> bool:
        return bool(self._rules)

    def __call__(self, texts: list[str]) -> tuple[list[str], Counter[str]]:
        """The texts with their copies behind each, and how many copies each kind of rule made."""
        found = [[text] for text in texts]
        made: Counter[str] = Counter()
        for rule in self._rules:
            for copies, news in zip(found, rule.write(texts)):
                for new in news:
                    if new.strip() and new not in copies:
                        copies.append(new)
                        made[rule.name] += 1
        return [text for copies in found for text in copies[not self._keep and len(copies) > 1 :]], made


def recipe(specs: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The specs as JSON, each with a digest of the files and workdirs that it names, so that a change is noticed."""
    found = []
    for spec in map(_options, specs):
        parts = []
        for path in (epath.Path(value) for key, value in spec.items() if key != "name" and isinstance(value, str)):
            if path.is_file():
                parts.append(path.read_bytes())
            elif (path / "checkpoints").is_dir():
                parts.append(" ".join(sorted(step.name for step in (path / "checkpoints").iterdir())).encode())
                files = path / "config.json", path / "summary.json"  # a summary has times: no two runs' are equal
                parts += [file.read_bytes() for file in files if file.exists()]
        digest = hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
        found.append(json.loads(json.dumps(spec)) | (dict(digest=digest) if parts else {}))
    return found


def _options(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """A rule's options with its `name`, which may stand alone."""
    return dict(name=spec) if isinstance(spec, str) else dict(spec)


class _Spent:
    """A rule with the options that all kinds share."""

    def __init__(self, rule: Rule, number: int, name: str, by_model: bool, *, copies: int, keep: bool, seed: int):
        self.name, self.by_model, self.keep = name, by_model, keep
        self._rule, self._copies, self._seed = rule, copies, f"{seed}\n{number}\n{name}\n"

    def write(self, texts: list[str]) -> list[list[str]]:
        return self._rule(texts, [self._rng(text) for text in texts], self._copies)

    def _rng(self, text: str) -> np.random.Generator:
        digest = hashlib.blake2b((self._seed + text).encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))


def _rule(where: str, number: int, options: dict[str, Any], load: Callable[[str], Write] | None) -> _Spent:
    if "name" not in options:
        raise Mistake(f"{where} needs a name, one of: {', '.join(lookup.names(__name__))}")
    name = str(options.pop("name")).replace("-", "_")
    kind = lookup.module(__name__, name)
    copies, keep, seed = options.pop("copies", 1), options.pop("keep", True), options.pop("seed", 0)
    if not isinstance(copies, int) or copies < 1:
        raise Mistake(f"{where}: copies={copies!r} is a number from 1 up; leave the rule out for none")
    by_model = "load" in lookup.keywords(kind.rule)
    if by_model and options.get("beams", copies) < copies:
        raise Mistake(f"{where}: beams={options['beams']} find no {copies} copies; give as many beams at least")
    rule = lookup.spend(where, kind.rule, options, **dict(load=load) if by_model else {})
    return _Spent(rule, number, name, by_model, copies=copies, keep=keep, seed=seed)


def singly(write: Callable[[str, np.random.Generator], str]) -> Rule:
    """The rule of a kind that looks at one text at a time."""
    return lambda texts, rngs, copies: [[write(t, rng) for _ in range(copies)] for t, rng in zip(texts, rngs)]


def share(where: str, value: float) -> float:
    """The value of an option that is a share; raises `Mistake` outside 0 to 1."""
    if not 0 <= value <= 1:
        raise Mistake(f"{where}={value!r} is a share from 0 to 1")
    return value


def sentences(text: str) -> list[str]:
    """Sentences or lines with the blanks behind them: end to end they are the text."""
    ends = [m.end() for m in _END.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if a < b]


def words(text: str) -> tuple[list[str], list[str]]:
    """Words and the blanks around them: gaps[0] words[0] gaps[1] words[1] ... gaps[-1] is the text."""
    parts = re.split(r"(\S+)", text)
    return parts[1::2], parts[::2]


def joined(words: Sequence[str], gaps: Sequence[str]) -> str:
    """The text of words and of the gaps around them, one more than words."""
    return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:]))
