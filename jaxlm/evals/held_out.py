"""How well a model does what it was trained to do, over examples of its objective.

measure(loss, batches)      {"loss": 4.2, "perplexity": 66.7, "accuracy": 0.31, "tokens": 5210, "follows": 0.74, ...}
"""

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any

import jax

from jaxlm.nn.loss import Sums


def measure(loss: Callable[[Mapping[str, Any]], Sums], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Loss (nats per token), perplexity, accuracy and what else the objective counts, each over all batches; `nats` and
    `tokens` (the sum of their weights) are what the first three come from.
    """
    nats = correct = tokens = 0.0
    others: dict[str, tuple[float, float]] = {}
    for batch in batches:
        sums = jax.device_get(loss(batch))
        nats, correct, tokens = nats + float(sums.nll), correct + float(sums.correct), tokens + float(sums.weight)
        for name, (total, weight) in sums.others.items():
            before = others.get(name, (0.0, 0.0))
            others[name] = before[0] + float(total), before[1] + float(weight)
    mean, accuracy = nats / max(tokens, 1.0), correct / max(tokens, 1.0)
    means = {name: total / max(weight, 1.0) for name, (total, weight) in others.items()}
    figures = dict(loss=mean, perplexity=math.exp(min(mean, 700.0)), accuracy=accuracy)
    return figures | means | dict(nats=nats, tokens=tokens)
