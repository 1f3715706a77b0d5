"""The training objectives, one file each; the folder is the registry (`config.objective.name = "mlm"` is
`objectives/mlm.py`).

A file exports

    KINDS                                           the kinds of models that it trains
    EXACT                                           whether it asks for each token but a document's first exactly once,
                                                    without noise, so that its loss is the likelihood of the text
    row(length, words, *, ...)                      how many tokens of a packed row make an example of `length`
    features(row, rng, words, length, *, ...)       numpy: {"tokens", "segments"} -> an example, arrays of fixed shapes
    loss(model, batch, key, *, ...)                 jax: `nn.loss.Sums` over the batch; dropout where there is a key
    pairs(*, ...)                                   may be left out: whether its row is of one document, not packed, and
                                                    has one of another document beside it: {"other_tokens",
                                                    "other_segments"}
    apart(*, ...)                                   may be left out: whether loss is a sum over rows, each the same
                                                    whatever rows are beside it
    cost(tokens, length, words, *, ...)             may be left out: how many of a row's tokens documents of so many
                                                    take up, int[n], where they need more room

`words` (jaxlm.data.words) tells special ids and where words begin, `rng` draws the noise, as a function of (seed, row)
alone. What stands behind the stars are the options of `config.objective`; each has a default. An objective for several
kinds of models takes `kind` there, too, and is told. An encoder-decoder's example has the encoder's `tokens` and
`segments`, and the decoder's `decoder_tokens`, `decoder_segments`, `labels` and `weights` (see `_pairs`). The features
of one objective may be used by another, which mixes them.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import numpy as np

from jaxlm import lookup
from jaxlm.data.words import Words
from jaxlm.nn.loss import Sums

Arrays = Mapping[str, np.ndarray]


class Objective(NamedTuple):
    """An objective with its options, for examples of one length."""

    name: str
    exact: bool
    row: int  # tokens
    pairs: bool  # whether a row of another document stands beside each
    cost: Callable[[np.ndarray], np.ndarray] | None  # of documents of so many tokens in a row, where it is not these
    features: Callable[[Arrays, np.random.Generator | None], dict[str, np.ndarray]]
    loss: Callable[..., Sums]  # (model, batch, key)
    apart: bool  # whether that is a sum over rows, each the same whatever rows are beside it


def of(section: Mapping[str, Any] | None, *, length: int, words: Words, kind: str) -> Objective:
    """From `config.objective`, `clm` by default, for a model of this kind.

    Raises `Mistake` for a name or key that is not, and for a kind of model that it does not train.
    """
    module, name, options = _named(section)
    if kind not in module.KINDS:
        able = [n for n in lookup.names(__name__) if kind in lookup.module(__name__, n).KINDS]
        raise lookup.Mistake(
            f"the objective {name!r} trains models of the kind {' or '.join(module.KINDS)}, and this one is of the "
            f"kind {kind}; objectives for it: {', '.join(able)}"
        )
    paired = getattr(module, "pairs", lambda: False)
    cost = getattr(module, "cost", None)
    functions = module.row, module.features, module.loss, paired
    lookup.known("config.objective", options, set().union(*map(lookup.keywords, functions)) - {"kind"})
    for function in functions:
        lookup.typed("config.objective", function, options)
    options["kind"] = kind
    row, features, loss, pairs = (_wanted(options, function) for function in functions)

    def example(one: Arrays, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return module.features(one, rng, words, length, **features)

    return Objective(
        name,
        module.EXACT,
        module.row(length, words, **row),
        paired(**pairs),
        cost and functools.partial(cost, length=length, words=words, **_wanted(options, cost)),
        example,
        functools.partial(module.loss, **loss),
        apart(section),
    )


def apart(section: Mapping[str, Any] | None) -> bool:
    """Whether a row's loss by `config.objective` is the same whatever rows are beside it."""
    module, _, options = _named(section)
    told = getattr(module, "apart", lambda: True)
    return told(**_wanted(options, told))


def _named(section: Mapping[str, Any] | None) -> tuple[Any, str, dict[str, Any]]:
    """The module of `config.objective`, its name, and the options beside it."""
    options = dict(section or {"name": "clm"})
    if "name" not in options:
        raise lookup.Mistake(f"config.objective needs a name, one of: {', '.join(lookup.names(__name__))}")
    return lookup.module(__name__, name := options.pop("name")), name, options


def _wanted(options: Mapping[str, Any], function: Callable) -> dict[str, Any]:
    """Those of the options that a function takes."""
    return {key: value for key, value in options.items() if key in lookup.keywords(function)}


def both_ways(objective: Mapping[str, Any] | None) -> bool:
    """Whether a decoder learns by `config.objective` to read what stands before its text in both directions."""
    return (objective or {}).get("name") == "prefix"
