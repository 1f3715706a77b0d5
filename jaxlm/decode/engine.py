"""Continue rows of token ids: one prefill, then token after token without leaving the device.

    engine = Engine(blueprint, params)
    engine.generate([[5, 6, 7], [8]], Sampling(temperature=0), max_new_tokens=4, stop=[2])      [[9, 4, 4, 1], [3, 3]]

    prefill   the prompts, padded on the right to a bucket, fill the cache; several continuations of a prompt share it
    decode    read each row's last token, choose the next, write it behind; until `steps` are done or no row is left

Shapes come in buckets and all else is traced, so that neither a prompt's length nor an option compiles anything anew.
Token ids in, token ids out: text is `jaxlm.lm`'s.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import axes
from jaxlm.decode import sampling, weights
from jaxlm.decode.sampling import Sampling
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint, Tree
from jaxlm.nn.cache import Cache

STEPS = 32  # tokens between two looks at the host, when nobody waits for them

Watch = Callable[[int, list[int]], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Rows in the making: `tokens_BS` holds prompt and continuation; the cache, all of them but each row's last."""

    cache: Cache
    tokens_BS: jax.Array
    prompts_B: jax.Array  # tokens of each prompt
    limits_B: jax.Array  # tokens at which a row is full
    done_B: jax.Array
    key_B: jax.Array  # each row's own randomness

    @property
    def lengths_B(self) -> jax.Array:
        return self.cache.lengths_B + 1


def bucket(n: int, least: int = 1, most: int | None = None) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n and `least`, cut off at `most`."""
    n = max(n, least)
    power = 1 << (n - 1).bit_length()
    size = power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power
    return size if most is None else min(size, most)


def settle(params: Tree) -> Tree:
    """The same arrays bound to their one device; on a mesh of several they are left as they are.

    All that is computed from them is then placed alike, so that no call is compiled anew for where its arguments lie.
    """
    return jax.tree.map(lambda x: x if len(x.devices()) > 1 else jax.device_put(x, *x.devices()), params)


def read(model: Any, cache: Cache, token_B: jax.Array, table: Any = None) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after one more token of each row, and the cache that holds it; `table` replaces the head's."""
    x_BTD, cache = model.hidden(token_B[:, None], cache=cache)
    head = model.head if table is None else model.head._replace(table_VD=table)
    return head(x_BTD)[:, 0], cache


class Engine:
    """A model ready to continue rows with token ids below `vocab`; `traces` counts how often a program was traced.

    A decoder that learned to read prefixes `both_ways` reads its prompts so.
    """

    def __init__(self, blueprint: Blueprint, params: Tree, vocab: int | None = None, both_ways: bool = False):
        self.both_ways = both_ways
        self.in_a_row = axes.platform() == "cpu"  # elsewhere the slice of a weight is part of the product that uses it
        self.blueprint, self.vocab = blueprint, vocab or blueprint.config.vocab
        self.params = settle(self.held(params))
        self._laid: tuple[Tree, Any] | None = None
        self.traces = dict(prefill=0, decode=0)
        self.prefill = jax.jit(self._prefill, static_argnames="slots")
        self.decode = jax.jit(self._decode, donate_argnames="state")

    def held(self, params: Tree) -> Tree:
        """The parameters as the engine keeps them: off the CPU, in the dtype that products read them in."""
        return params if self.in_a_row else weights.rounded(params, self.blueprint.config.dtype)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Sampling, *, max_new_tokens: int, copies: int = 1,
        stop: Iterable[int] = (), seed: int = 0, ids: Iterable[int] | None = None, steps: int = STEPS,
        watch: Watch | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Continue each prompt `copies` times, by `max_new_tokens` or to the end of the context: rows of new tokens.

        A row ends before a token of `stop`, and where the constraints of `how` leave none. What it draws depends on
        `seed`, its prompt's entry in `ids` (its number, unless given), which copy it is, and where in the row it
        stands. `watch(row, new)` is shown new tokens every `steps` steps, and ends the row by returning True. Raises
        `Mistake` for a prompt that is empty or too long.
        """
        state, count = self.start(prompts, max_new_tokens, copies=copies, seed=seed, ids=ids)
        stop_V = self.mark(stop)
        how, halted = how.rows(len(state.done_B)), np.zeros(len(state.done_B), bool)
        first = shown = jax.device_get(state.prompts_B)
        params = self.decoding()
        while True:
            state = self.decode(params, state, halted, how, stop_V, np.int32(steps))
            tokens, lengths, done = jax.device_get((state.tokens_BS, state.lengths_B, state.done_B))
            for row in range(count) if watch else ():
                new = tokens[row, shown[row] : lengths[row]].tolist()
                halted[row] |= bool(new) and watch(row, new)  # type: ignore[misc]
            if (done | halted).all():
                return [tokens[row, first[row] : lengths[row]].tolist() for row in range(count)]
            shown = lengths

    def decoding(self) -> tuple[Tree, Any]:
        """The parameters as rows are decoded with, and the head's table where it has a layout of its own."""
        if not self.in_a_row:
            return self.params, None
        dtype = self.blueprint.config.dtype
        if self._laid is None:
            table = weights.head(self.blueprint.bind(self.params).head.table_VD, dtype)
            self._laid = weights.lay(self.params, dtype), table
        return self._laid

    def mark(self, tokens: Iterable[int]) -> np.ndarray:
        """Which ids are among `tokens`: booleans [V]."""
        return np.isin(np.arange(self.vocab), np.array([*tokens], np.int64))

    def start(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, copies: int = 1, seed: int = 0,
        ids: Iterable[int] | None = None,
    ) -> tuple[State, int]:  # fmt: skip
        """The state before the first new token, padded to a bucket of rows, and how many rows are real."""
        context = self.blueprint.config.context
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        if not len(lengths) or not lengths.all():
            raise Mistake(
                "there is no prompt" if not len(lengths) else "a prompt holds no token; it needs one at least"
            )
        pair = self.blueprint.kind == "encoder-decoder"  # the prompt is the encoder's, and the row begins anew
        if lengths.max() >= context + pair:
            raise Mistake(f"a prompt of {lengths.max():,} tokens leaves no room in a context of {context:,}")
        limits = np.minimum(np.where(pair, 1, lengths) + min(max_new_tokens, context), context)
        slots = bucket(int(limits.max()), 64, context)
        most = bucket(int(lengths.max()), 16, context if pair else slots)
        tokens_BT = np.zeros((bucket(len(prompts)), most), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        count = len(prompts) * copies
        origin_B = np.arange(len(tokens_BT) * copies) // copies  # which prompt a row continues
        copy_B = (np.arange(len(origin_B)) % copies).astype(np.uint32)
        padding = (0, len(tokens_BT) - len(prompts))
        names = np.pad(np.array([*(range(len(prompts)) if ids is None else ids)], np.uint32), padding)
        lengths, limits = np.pad(lengths, padding, constant_values=1), np.pad(limits, padding)
        state = self.prefill(
            self.params, tokens_BT, lengths, limits[origin_B], np.uint32(seed % 2**32), names[origin_B], copy_B,
            origin_B if copies > 1 else None, slots=slots,
        )  # fmt: skip
        return state, count

    def _prefill(self, params, tokens_BT, lengths_B, limits_B, seed, name_B, copy_B, origin_B, *, slots):
        self.traces["prefill"] += 1
        model = self.blueprint.bind(params)
        B, T = tokens_BT.shape
        if self.blueprint.kind == "encoder-decoder":
            real_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
            memory_BTD = model.encode(tokens_BT, segments_BS=real_BT)
            cache = model.remember(model.empty_cache(B, slots), memory_BTD, real_BT)
            tokens_BS, lengths_B = jnp.full((B, slots), self.blueprint.config.start), jnp.ones_like(lengths_B)
        else:
            real_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
            where = dict(prefix_BT=real_BT) if self.both_ways else {}
            cache = model.hidden(tokens_BT, cache=model.empty_cache(B, slots), **where)[1]
            tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, slots - T)))
        # The last token is read by the first step.
        cache = dataclasses.replace(cache, lengths_B=lengths_B - 1, fresh=False)
        if origin_B is not None:
            cache, tokens_BS, lengths_B = cache.rows(origin_B), tokens_BS[origin_B], lengths_B[origin_B]
        key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(name_B)
        key_B = jax.vmap(jax.random.fold_in)(key_B, copy_B)
        cache = cache.unstacked() if self.in_a_row else cache
        return State(cache, tokens_BS, lengths_B, limits_B, limits_B <= lengths_B, key_B)

    def _decode(self, params, state: State, halted_B, how: Sampling, stop_V, steps) -> State:
        self.traces["decode"] += 1
        state = dataclasses.replace(state, done_B=state.done_B | halted_B)
        model, table = self.blueprint.bind(params[0]), params[1]
        row_B = jnp.arange(len(state.done_B))

        def unfinished(carry):
            state, step = carry
            return (step < steps) & ~state.done_B.all()

        def extend(carry):
            state, step = carry
            tokens_BS, at_B, held = state.tokens_BS, state.lengths_B, state.cache.lengths_B
            logits_BV, cache = read(model, state.cache, tokens_BS[row_B, at_B - 1], table)
            where = (state.prompts_B, at_B, state.limits_B)
            logits_BV = sampling.constrain(logits_BV[:, : self.vocab], tokens_BS, *where, stop_V, how)
            token_B = sampling.choose(logits_BV, jax.vmap(jax.random.fold_in)(state.key_B, at_B), how)
            stuck_B = jnp.isneginf(logits_BV[row_B, token_B])  # constraints leave no token
            done_B = state.done_B | stop_V[token_B] | stuck_B
            tokens_BS = tokens_BS.at[row_B, jnp.where(done_B, tokens_BS.shape[1], at_B)].set(token_B, mode="drop")
            cache = dataclasses.replace(cache, lengths_B=jnp.where(done_B, held, cache.lengths_B))
            done_B |= cache.lengths_B + 1 >= state.limits_B
            return dataclasses.replace(state, cache=cache, tokens_BS=tokens_BS, done_B=done_B), step + 1

        return jax.lax.while_loop(unfinished, extend, (state, jnp.int32(0)))[0]
