"""Beam search: the likeliest continuations that a search of `beams` rows a prompt finds.

    search = BeamSearch(engine)
    search([[5, 6, 7]], beams=2, max_new_tokens=4, stop=[2])       [[Found([9, 4], -0.8), Found([9, 1, 1, 3], -0.9)]]

A finished row's score is the sum of its log-probabilities (nats) / length ** length_penalty, where the length counts
the new tokens and the stop token: above 0 favours long rows, since sums are negative. Rows end and are ranked as in
transformers.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decode import sampling
from jaxlm.decode.engine import Engine, State, read
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake, key

NOT_THERE = -np.inf  # the score of a row that is not there
STEEP = 10  # a length penalty at most
EARLY = {"best": 0, "full": 1, "never": 2}  # `early_stopping`: False, True and "never" in transformers


class Found(NamedTuple):
    """A continuation, without its stop token, and its score."""

    tokens: list[int]
    score: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """B prompts of W rows each: those that grow, and the best that have finished, both best first."""

    rows: State  # B x W rows, those of a prompt together
    sums: jax.Array  # [B, W] log-probabilities of the growing rows
    tokens: jax.Array  # [B, W, S] finished rows
    lengths: jax.Array  # [B, W]
    scores: jax.Array  # [B, W]
    over_B: jax.Array


class BeamSearch:
    """Beam search with an engine's model; it is compiled once per shape, number of beams and number of stop tokens."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._search = jax.jit(self._run, static_argnames=("beams", "wide"))

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, beams: int, max_new_tokens: int, stop: Sequence[int] = (),
        length_penalty: float = 1.0, early_stopping: str = "best", how: Sampling = Sampling(),  # noqa: B008
    ) -> list[list[Found]]:  # fmt: skip
        """The best continuations of each prompt, `beams` of them if there are so many; of `how` the constraints apply.

        `early_stopping` says when a prompt is done: "full" as soon as `beams` rows have finished; "best" when the best
        growing row, scored at its present length, is behind all of them; "never" when it would be behind at any length
        that it may reach. Raises `Mistake` as `Engine.generate` does, and where constraints leave nothing to write.
        """
        if beams < 1:
            raise Mistake(f"beams={beams}; it takes one at least")
        if not -STEEP <= length_penalty <= STEEP:
            raise Mistake(f"length_penalty={length_penalty} is outside {-STEEP} to {STEEP}")
        patience = key("early_stopping", early_stopping, EARLY)
        rows, _ = self._engine.start(prompts, max_new_tokens, copies=beams)
        begins = jax.device_get(rows.prompts_B)[::beams]
        stop_V = self._engine.mark(stop)
        wide = min(1 + max(1, int(stop_V.sum())), len(stop_V)) * beams  # so many that enough of them do not end at once
        found = self._search(
            self._engine.decoding(), rows, how.rows(len(rows.done_B)), stop_V,
            np.float32(length_penalty), np.int32(patience), beams=beams, wide=wide,
        )  # fmt: skip
        tokens, lengths, scores = jax.device_get((found.tokens, found.lengths, found.scores))
        if (scores[: len(prompts), 0] == NOT_THERE).any():
            raise Mistake(f"beams={beams}: no row can end, since constraints leave no token to add; loosen {how}")
        return [
            [
                Found(tokens[b, w, begins[b] : lengths[b, w]].tolist(), float(scores[b, w]))
                for w in range(beams)
                if scores[b, w] > NOT_THERE
            ]
            for b in range(len(prompts))
        ]

    def _run(self, params, rows: State, how, stop_V, penalty, patience, *, beams, wide) -> Beams:
        model, table = self._engine.blueprint.bind(params[0]), params[1]
        R, S = rows.tokens_BS.shape
        B, V = R // beams, len(stop_V)
        first_B1 = jnp.arange(B)[:, None] * beams

        def grow(found: Beams) -> Beams:
            rows = found.rows
            at_B = rows.lengths_B
            logits_BV, cache = read(model, rows.cache, rows.tokens_BS[jnp.arange(R), at_B - 1], table)
            logits_BV = jax.nn.log_softmax(logits_BV)[:, :V]  # ids that no token has keep their share, as when trained
            where = (rows.prompts_B, at_B, rows.limits_B)
            logits_BV = sampling.constrain(logits_BV, rows.tokens_BS, *where, stop_V, how)
            sums, pick = jax.lax.top_k((found.sums.reshape(R, 1) + logits_BV).reshape(B, beams * V), wide)
            parent, token = first_B1 + pick // V, pick % V  # [B, wide], as everything below
            length, prompt, limit = at_B[parent], rows.prompts_B[parent], rows.limits_B[parent]
            stops = stop_V[token]
            ends = stops | (length + 1 >= limit)
            slot = jnp.where(stops, S, length)[..., None]
            tokens = jnp.where(jnp.arange(S)[None, None] == slot, token[..., None], rows.tokens_BS[parent])

            # what ends among the first `beams` may replace the worst that had ended before
            counted = ends & (jnp.arange(wide) < beams)[None] & ~found.over_B[:, None]
            scores = jnp.where(counted, sums / (length + 1 - prompt).astype(jnp.float32) ** penalty, NOT_THERE)
            scores, best = jax.lax.top_k(jnp.concatenate([found.scores, scores], 1), beams)
            lengths = jnp.take_along_axis(jnp.concatenate([found.lengths, length + ~stops], 1), best, 1)
            ended = jnp.take_along_axis(jnp.concatenate([found.tokens, tokens], 1), best[..., None], 1)

            # the best of what does not end grows on
            sums, best = jax.lax.top_k(jnp.where(ends, NOT_THERE, sums), beams)
            parent = jnp.take_along_axis(parent, best, 1).reshape(R)
            tokens = jnp.take_along_axis(tokens, best[..., None], 1).reshape(R, S)
            rows = dataclasses.replace(rows, cache=cache.rows(parent), tokens_BS=tokens)

            # can the best growing row still overtake the worst finished one?
            new = (length - prompt)[:, 0] + 1
            new = jnp.where((patience == EARLY["never"]) & (penalty > 0), (limit - prompt)[:, 0], new)
            ahead = sums[:, 0] / new.astype(jnp.float32) ** penalty > scores[:, -1]  # never where no row grows on: -inf
            full = (scores[:, -1] > NOT_THERE) & (patience == EARLY["full"])
            over_B = found.over_B | ~ahead | full
            return Beams(rows, sums, ended, lengths, scores, over_B)

        nothing = jnp.full((B, beams), NOT_THERE)
        alone = nothing.at[:, 0].set(0.0)  # at first the rows of a prompt are equal, and one stands for all
        tokens = jnp.zeros((B, beams, S), jnp.int32)
        start = Beams(rows, alone, tokens, tokens[..., 0], nothing, rows.done_B[::beams])
        return jax.lax.while_loop(lambda found: ~found.over_B.all(), grow, start)
