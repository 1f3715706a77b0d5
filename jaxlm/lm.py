"""A trained language model in a notebook: `lm = jaxlm.load(WORKDIR)`.

    lm.generate("def main(", temperature=0.8, top_p=0.95)     ["argv):\\n    ..."]
    lm.score(["hello"])                                       [Score(nats=9.1, tokens=3, bytes=5)]
    lm.logits(lm.tokenizer.encode("hello"))                   float32 [1, T, V]
    load("path/to/Llama-3.2-1B")                              a Hugging Face folder, as well

Its parts are lm.model, lm.params, lm.tokenizer and lm.config. A score has loss, perplexity and bits_per_byte.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any, TypeVar

from etils import epath
import jax
import numpy as np

from jaxlm import axes, checkpoint, hf, lookup, marks, models, objectives
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.data.tokenizers import Named, Tokenizer, well_formed
from jaxlm.decode.beam import BeamSearch
from jaxlm.decode.engine import STEPS, Engine, bucket
from jaxlm.decode.sampling import Sampling
from jaxlm.evals import perplexity
from jaxlm.lookup import Mistake
from jaxlm.models import Blueprint, Tree
from jaxlm.nn.loss import LOGITS_AT_ONCE
from jaxlm.reply import Reply, Row

STREAM = 4  # tokens between two looks, when somebody reads along

Function = TypeVar("Function", bound=Callable)
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


def load(path: str, *, step: str | int = "newest", dtype: str = "auto", specials: bool = False) -> "LM":
    """The model of a workdir, from its "newest" or "best" checkpoint or that of a step; or of a Hugging Face folder.

    `dtype` is what products are computed in; "auto" is what the workdir was trained in, else bfloat16 where there is an
    accelerator. With `specials`, their names in a text mean them, in prompts and in answers: "the <extra_id_0> of". A
    Hugging Face folder without tokenizer files takes and gives token ids. Raises `Mistake` when the folder is neither
    or lacks a part.
    """
    if hf.is_folder(path):
        return _load_hugging_face(path, dtype, specials)
    config = configs.read(path)
    known = config.to_dict()
    lookup.key(f"{path}/config.json", "model", known)
    tokenizer = tokenizers.load(epath.Path(path) / "tokenizer")
    dtype = str(config.get("dtype", "auto")) if dtype == "auto" else dtype
    blueprint = Blueprint.of(config.model, vocab=tokenizer.vocab, dtype=_computed(dtype))
    _, params = checkpoint.restore_params(path, blueprint.shapes, step=step)
    more = dict(ends=known.get("ends", ()), forced=known.get("forced", {}))
    tokenizer = Named(tokenizer) if specials else tokenizer
    return LM(blueprint, params, tokenizer, config, **more, both_ways=objectives.both_ways(known.get("objective")))


def _load_hugging_face(folder: str, dtype: str, specials: bool) -> "LM":
    config = hf.read_config(folder)
    section, form = models.of_hugging_face(folder, config)
    tokenizer = tokenizers.load(folder) if tokenizers.find(folder) else None
    blueprint = Blueprint.of(
        section, vocab=section["vocab"] if tokenizer is None else tokenizer.vocab, dtype=_computed(dtype)
    )
    params = hf.restore(folder, form, blueprint.shapes, mesh=axes.mesh(devices=jax.local_devices()[:1]))
    tokenizer = Named(tokenizer) if specials and tokenizer else tokenizer
    return LM(blueprint, params, tokenizer, **marks.read(folder)._asdict())


def _computed(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def spelled(fn: Function) -> Function:
    """Answer an option that `fn` does not take with the nearest one that it does, as a `Mistake`."""
    takes = [name for name in inspect.signature(fn).parameters if name != "self"]

    @functools.wraps(fn)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name not in takes:
                raise lookup.miss(fn.__name__, name, takes)
        return fn(*args, **kwargs)

    return checked  # type: ignore[return-value]


class LM:
    """A model with its parameters and its tokenizer."""

    def __init__(
        self, blueprint: Blueprint, params: Tree, tokenizer: Tokenizer | None, config: Any = None,
        ends: Sequence[int] = (), forced: Mapping[str, int] = {}, both_ways: bool = False,
    ):  # fmt: skip
        """`both_ways`: whether a decoder reads its prompt so, as after the objective `prefix`."""
        self._both_ways = both_ways and blueprint.kind == "decoder"
        self.blueprint, self.params, self.config, self.forced = blueprint, params, config, forced
        self._tokenizer = tokenizer
        eos = None if tokenizer is None else tokenizer.eos
        self.ends: list[int] = [*ends] if eos is None or eos in ends else [*ends, eos]
        self.model = blueprint.bind(params)
        pair = blueprint.kind == "encoder-decoder"
        forward, hidden = (_about, _encode) if pair else (_logits, _states)
        self._forward = jax.jit(lambda params, tokens_BT, **where: forward(blueprint.bind(params), tokens_BT, **where))
        self._hidden = jax.jit(lambda params, tokens_BT, **where: hidden(blueprint.bind(params), tokens_BT, **where))
        self._pooled = jax.jit(lambda params, tokens_BT, **where: _pool(blueprint.bind(params), tokens_BT, **where))
        self._nll = jax.jit(functools.partial(_nll, blueprint))

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `Mistake` where the model came without one: it then takes and gives token ids."""
        if self._tokenizer is None:
            raise Mistake("this model came without tokenizer files: give it token ids, and it gives token ids")
        return self._tokenizer

    @functools.cached_property
    def engine(self) -> Engine:
        """What continues rows of token ids; made when first needed."""
        vocab = self._tokenizer.vocab if self._tokenizer else None
        return Engine(self.blueprint, self.params, vocab, self._both_ways)

    @functools.cached_property
    def _beams(self) -> BeamSearch:
        return BeamSearch(self.engine)

    @property
    def context(self) -> int:
        """The tokens of the rows that it was trained on, where the config tells, else what the model can read."""
        most = self.blueprint.config.context
        return min(most, (self.config or {}).get("length", most))

    def logits(
        self, token_ids: Ids, *, decoder_ids: Ids | None = None, mask: Ids | None = None, types: Ids | None = None,
        decoder_mask: Ids | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Logits [B, T, V] in float32 of what follows each of `token_ids`: one row [T], or rows of one length [B, T].

        A `mask` of the same shape is 0 where a token is padding, on either side: no other token sees it, positions
        count without it, and its own logits mean nothing. `types` are an encoder's token types. An encoder's logits are
        those of the token itself, as if it were masked; an encoder-decoder's, of what follows each of `decoder_ids`.
        Raises `Mistake` for rows of different lengths, for ids that the model does not know, and beyond its context.
        """
        if (decoder_ids is None) == (self.blueprint.kind == "encoder-decoder"):
            need = "needs decoder_ids" if decoder_ids is None else "takes no decoder_ids"
            raise Mistake(f"{self.blueprint.name} is of the kind {self.blueprint.kind}: lm.logits {need}")
        if decoder_ids is None:
            return self._read(self._forward, token_ids, mask, types)
        decoder_BT, padding = self._padded(decoder_ids)
        if decoder_mask is None:
            decoder_mask = np.ones_like(decoder_BT)
        more = dict(
            decoder_BT=np.pad(decoder_BT, padding),
            decoder_segments_BT=np.pad(_like(decoder_BT, decoder_mask, "a mask is 0 or 1", 2), padding),
        )
        return self._read(self._forward, token_ids, mask, types, **more)[:, : decoder_BT.shape[1]]

    def hidden(self, token_ids: Ids, *, mask: Ids | None = None, types: Ids | None = None) -> np.ndarray:
        """Final hidden states [B, T, D], of an encoder-decoder those of its encoder; else as for `logits`."""
        return self._read(self._hidden, token_ids, mask, types)

    def pooled(self, token_ids: Ids, *, mask: Ids | None = None, types: Ids | None = None) -> np.ndarray:
        """An encoder's pooled state [B, D] of each row, whose first token is no padding; else as `hidden`."""
        if self.blueprint.kind != "encoder":
            raise Mistake(f"{self.blueprint.name} is no encoder, so it has no pooled state")
        return self._read(self._pooled, token_ids, mask, types)

    def _padded(self, token_ids: Ids) -> tuple[np.ndarray, tuple]:
        """Ids that the model can read, and how to pad them on the right to a bucket."""
        tokens_BT = _whole(token_ids, "token ids")
        length, context, vocab = tokens_BT.shape[1], self.blueprint.config.context, self.blueprint.config.vocab
        if tokens_BT.min() < 0 or tokens_BT.max() >= vocab:
            raise Mistake(f"ids from {tokens_BT.min()} to {tokens_BT.max()}, but the model's vocabulary has {vocab}")
        if length > context:
            raise Mistake(f"{length:,} tokens, but the model reads {context:,}")
        return tokens_BT, ((0, 0), (0, bucket(length, 16, context) - length))

    def _read(
        self, forward: Callable, token_ids: Ids, mask: Ids | None, types: Ids | None, **where: np.ndarray
    ) -> np.ndarray:
        tokens_BT, padding = self._padded(token_ids)
        if mask is None and self.blueprint.kind != "decoder":  # a decoder does not look at what is on the right
            mask = np.ones_like(tokens_BT)
        if mask is not None:
            where["segments_BT"] = np.pad(_like(tokens_BT, mask, "a mask is 0 or 1", 2), padding)
        if types is not None:
            known = getattr(self.blueprint.config, "types", 0)
            where["types_BT"] = np.pad(_like(tokens_BT, types, f"token types are below {known}", known), padding)
        out = np.asarray(forward(self.params, np.pad(tokens_BT, padding), **where))
        return out[:, : tokens_BT.shape[1]] if out.ndim == 3 and "decoder_BT" not in where else out

    def nll(self, rows: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats [B, T] of tokens 1.. of rows [B, T + 1], each given those before it.

        Raises `Mistake` for a model that sees more than what came before.
        """
        if self.blueprint.kind != "decoder":
            raise Mistake(f"{self.blueprint.name} is of the kind {self.blueprint.kind}: only decoders score a text")
        return np.asarray(self._nll(self.params, rows))

    def document(self, text: str) -> np.ndarray:
        """Token ids of a text as a store holds it: bos and eos around it, where the tokenizer adds them.

        One that was trained here adds both; a published or exported decoder's mostly adds no eos, so that a score is
        then without it.
        """
        tok = self.tokenizer
        before, after = [tok.bos] if tok.add_bos else [], [tok.eos] if tok.add_eos else []
        return np.array([*before, *tok.encode(well_formed("the text", text)), *after], np.int32)

    @spelled
    def score(
        self, texts: str | Sequence[str], *, context: int | None = None, stride: int | None = None, batch: int = 8
    ) -> list[perplexity.Score]:
        """For each text how well it is predicted: nats, tokens, bytes, and from them loss, perplexity, bits_per_byte.

        What is longer than the context is read in windows, `stride` tokens apart (half a context unless given).
        """
        texts = [texts] if isinstance(texts, str) else texts
        sized = ((self.document(text), len(text.encode())) for text in texts)
        documents = ((row, tokenizers.predicted_bytes(self.tokenizer, row, size)) for row, size in sized)
        return perplexity.evaluate(self.nll, documents, context=context or self.context, stride=stride, batch=batch)

    @spelled
    def generate(
        self, prompts: str | Sequence[str] | Ids, *, max_new_tokens: int = 128, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0, min_new_tokens: int = 0, forced_bos: int | None = None,
        forced_eos: int | None = None, num_return_sequences: int = 1, stop: str | Sequence[str] = (), seed: int = 0,
        beams: int = 1, length_penalty: float = 1.0, early_stopping: str = "best",
        stream: Callable[[str], object] | None = None, batch: int = 16, first: int = 0,
    ) -> list[Any]:  # fmt: skip
        """Continue each prompt until eos, a `stop` string, `max_new_tokens` or the context's end: the new texts alone.

        One text a prompt, or a list of texts where `num_return_sequences` is above 1. Temperature 0 is greedy. With
        `beams` of 2 or more the likeliest texts are searched for instead of drawn, and where there are no more, fewer
        are given. What a prompt draws depends on `seed` and its place among the prompts, counted from `first`: neither
        on the others nor on `batch`. `stream` is called with each piece of the one text as it comes. Prompts of token
        ids are continued by token ids.

        An encoder-decoder's text begins with the token `forced_bos`, and ends with `forced_eos` where it gets as long
        as it may (a decoder's too, where one is given): ids, -1 for none; unless given, those that were published with
        the model. Of published defaults no others are taken: how to search or draw is said here.

        Raises `Mistake` for a prompt that does not fit the context, for an empty one where the tokenizer has no bos,
        and for options that cannot be met.
        """
        if self.blueprint.kind == "encoder":
            raise Mistake(f"{self.blueprint.name} is an encoder: it fills gaps (lm.logits) but continues nothing")
        how = Sampling(
            temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size, min_new_tokens,
            self._forced("bos", forced_bos), self._forced("eos", forced_eos),
        )  # fmt: skip
        stop = [stop] if isinstance(stop, str) else list(stop)
        alone = isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer))
        texts: list[Any] = [prompts] if alone else [*prompts]
        tokens = [self.prompt(text) for text in texts]
        in_ids = any(not isinstance(text, str) for text in texts)
        if in_ids and (stop or stream or any(isinstance(text, str) for text in texts)):
            raise Mistake("prompts are all texts or all token ids; stop strings and stream are for texts")
        copies = num_return_sequences
        if min(copies, max_new_tokens, batch, beams) < 1 or "" in stop:
            raise Mistake(
                "num_return_sequences, max_new_tokens, batch, beams: 1 at least; and a stop string is not empty"
            )
        if stream and len(texts) * copies * beams > 1:
            raise Mistake(
                f"stream follows one text; {len(texts)} prompts x {copies} sequences x {beams} beams are more"
            )
        if beams > 1:
            _searched(beams, copies, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        pair = self.blueprint.kind == "encoder-decoder"  # what it writes does not begin with the prompt
        begin = lambda prompt: Row() if in_ids else Reply(self.tokenizer, [] if pair else prompt, stop, stream)  # noqa: E731
        out: list[list[Any]] = []
        for at in range(0, len(tokens), batch):
            part = tokens[at : at + batch]
            if beams > 1:
                found = self._beams(
                    part, beams=beams, max_new_tokens=max_new_tokens, stop=self.ends, length_penalty=length_penalty,
                    early_stopping=early_stopping, how=how,
                )  # fmt: skip
                replies = [[begin(prompt) for _ in best[:copies]] for prompt, best in zip(part, found)]
                for some, best in zip(replies, found):
                    for reply, one in zip(some, best):
                        reply.add(one.tokens)
            else:
                replies = [[begin(prompt) for _ in range(copies)] for prompt in part]
                self.engine.generate(
                    part, how, max_new_tokens=max_new_tokens, copies=copies, stop=self.ends, seed=seed,
                    ids=range(first + at, first + at + len(part)), steps=STREAM if stream else STEPS,
                    watch=lambda row, new: replies[row // copies][row % copies].add(new),  # noqa: B023
                )  # fmt: skip
            out += [[reply.finish() for reply in some] for some in replies]
        return [row[0] for row in out] if copies == 1 else out

    def _forced(self, name: str, token: int | None) -> int:
        """The token to begin or end with: as asked for, else as published with the model; -1 for none."""
        token = self.forced.get(name, -1) if token is None else token
        vocab = self._tokenizer.vocab if self._tokenizer else self.blueprint.config.vocab
        if token >= vocab:
            raise Mistake(f"forced_{name}={token}: the vocabulary has {vocab} ids; -1 forces none")
        if name == "bos" and token >= 0 and self.blueprint.kind == "decoder":
            raise Mistake(f"forced_bos={token} is for encoder-decoders; a decoder's belongs at the end of its prompt")
        return token

    def prompt(self, text: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt. Raises `Mistake` for one that is empty, no text, or too long for the context."""
        context, vocab = self.blueprint.config.context, self.blueprint.config.vocab
        pair = self.blueprint.kind == "encoder-decoder"
        if isinstance(text, str) and pair:
            tokens = self.document(text).tolist()
        elif isinstance(text, str):
            tok = self.tokenizer
            tokens = tok.encode(well_formed("the prompt", text))
            if tok.bos is not None and (tok.add_bos or not tokens):
                tokens = [tok.bos, *tokens]
        else:
            tokens = [int(i) for i in text]
            if any(not 0 <= i < vocab for i in tokens):
                raise Mistake(f"a prompt holds ids from {min(tokens)} to {max(tokens)}; the vocabulary has {vocab}")
        if not tokens:
            raise Mistake("the prompt is empty, and this tokenizer has no bos token to begin with; give it some text")
        if len(tokens) >= context + pair:
            raise Mistake(
                f"the prompt has {len(tokens):,} tokens, which leaves no room in the model's context of {context:,}"
            )
        return tokens


def _searched(beams: int, copies: int, **drawn: float) -> None:
    """Raise `Mistake` for what a search for the likeliest cannot do."""
    free = [(name, getattr(Sampling, name)) for name in drawn] + [("temperature", 0)]
    faults = [f"{name}={value}" for name, value in drawn.items() if (name, value) not in free]
    if copies > beams:
        faults = [f"num_return_sequences={copies}"]
    if faults:
        raise Mistake(f"beams={beams} finds as many texts, the likeliest, so {faults[0]} cannot be")


def _whole(ids: Ids, what: str, kinds: str = "iu") -> np.ndarray:
    """Whole numbers [B, T]."""
    try:
        array = np.atleast_2d(np.asarray(ids))
    except ValueError:
        raise Mistake(f"{what}: rows of one length; pad them and give a mask, or call once for each") from None
    if array.ndim != 2 or not array.size or array.dtype.kind not in kinds:
        raise Mistake(f"{what}: whole numbers, one at least, in one row or in rows of one length")
    return array.astype(np.int32)


def _like(tokens_BT: np.ndarray, values: Ids, rule: str, below: int) -> np.ndarray:
    """Whole numbers, or booleans for 1 and 0, one for each token."""
    array = _whole(values, rule, "iub")
    if array.shape != tokens_BT.shape or array.min() < 0 or array.max() >= below:
        raise Mistake(f"{rule}, one for each of {tokens_BT.shape} tokens; this has {array.shape} up to {array.max()}")
    return array


def _logits(model: Any, tokens_BT: jax.Array, **where: Any) -> jax.Array:
    return model(tokens_BT, **where)[0]


def _states(model: Any, tokens_BT: jax.Array, **where: Any) -> jax.Array:
    return model.hidden(tokens_BT, **where)[0]


def _about(model: Any, tokens_BT: jax.Array, *, segments_BT, decoder_BT, decoder_segments_BT) -> jax.Array:
    return model(tokens_BT, decoder_BT, segments_BS=segments_BT, segments_BT=decoder_segments_BT)[0]


def _encode(model: Any, tokens_BT: jax.Array, *, segments_BT) -> jax.Array:
    return model.encode(tokens_BT, segments_BS=segments_BT)


def _pool(model: Any, tokens_BT: jax.Array, **where: Any) -> jax.Array:
    return model.pool(model.hidden(tokens_BT, **where)[0])


def _nll(blueprint: Blueprint, params: Tree, rows: jax.Array) -> jax.Array:
    """Nats [B, T] of tokens 1.. of rows [B, T + 1]; the logits of a few tokens exist at a time."""
    model = blueprint.bind(params)
    x_BTD, _ = model.hidden(rows[:, :-1])
    B, T, D = x_BTD.shape
    head = model.head._replace(table_VD=model.head.table_VD.astype(x_BTD.dtype))

    def one(token):
        x_D, label = token
        logits_V = head(x_D[None, None])[0, 0]
        return jax.nn.logsumexp(logits_V) - logits_V[label]

    tokens = x_BTD.reshape(B * T, D), rows[:, 1:].reshape(B * T)
    return jax.lax.map(one, tokens, batch_size=max(1, min(B * T, LOGITS_AT_ONCE // len(head.table_VD)))).reshape(B, T)
