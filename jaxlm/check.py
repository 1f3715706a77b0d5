"""Hold a Hugging Face folder's model against transformers itself: what `jaxlm convert --check` tells.

    check("gpt2/")      {("a prompt of 310 tokens", "logits"): 4.8e-06, ("padded on the left", "logits"): 3.1e-06, ...}

transformers is asked for a prompt and two short rows, each alone. We are asked for them alone, padded on either side,
packed into one row and read through the cache, and have to say the same. Then our model goes back to a folder, which
transformers has to load without a key that is missing or too many, and to answer as before. Read `compare` first.
"""

from collections.abc import Mapping, Sequence
import inspect
import tempfile
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxlm import hf, lm, models
from jaxlm.lm import LM
from jaxlm.lookup import Mistake

TOLERANCE = 1e-4  # how much a number may differ
SIZES = dict(prompt=(310, 40), first=(9, 6), second=(5, 7))  # tokens of a row, and those of a decoder that reads it
NAMES = dict(token_ids="input_ids", types="token_type_ids", decoder_ids="decoder_input_ids")  # as transformers says it
CACHED = 6  # tokens of a decoder's prompt that are read one at a time, after all the others

Row = dict[str, np.ndarray]  # by the names that `LM.logits` has: token_ids [T], perhaps types [T] or decoder_ids
Answers = dict[str, np.ndarray]  # what there is of logits [T, V], hidden [T, D] and pooled [D]
Said = dict[str, Answers]  # by the names of rows


def check(folder: epath.PathLike) -> dict[tuple[str, str], float]:
    """The largest difference between our answers and those of transformers, in float32: (how asked, for what) -> it.

    Keys that transformers misses in our export or does not know count as a difference of 1 each. Raises `Mistake` where
    torch or transformers is not installed, where transformers has no such model, and for a folder that jaxlm does not
    load or could not write.
    """
    _libraries()
    with jax.default_matmul_precision("highest"):
        ours = lm.load(str(folder), dtype="float32")
        _, form, config = models.to_hugging_face(ours.blueprint)
        (cls,), asked = config["architectures"], rows(ours)
        theirs = Transformers(folder, cls, ours.blueprint.kind)
        want = theirs.answers(asked)
        with tempfile.TemporaryDirectory() as exported:
            hf.export(exported, form, ours.params, config)
            again = Transformers(exported, cls, ours.blueprint.kind)
            want["exported"] = again.answer(asked["prompt"])
        found = compare(answers(ours, asked), want)
    lost = again.lost - theirs.lost  # of what the folder itself has too many or too few we are not the cause
    return found | {("exported", ", ".join(sorted(lost)) or "missing, unexpected or mismatched keys"): float(len(lost))}


def compare(ours: Mapping[str, Said], want: Mapping[str, Answers]) -> dict[tuple[str, str], float]:
    """The largest difference for each way to ask and each answer, NaN where one is; `want` has answers by rows."""
    found = {}
    for way, said in ours.items():
        for key in next(iter(said.values())):
            pairs = [(np.asarray(mine[key]), want[row][key]) for row, mine in said.items()]
            if any(a.shape != b.shape for a, b in pairs):
                raise AssertionError(f"{way}: {key} are {[(a.shape, b.shape) for a, b in pairs]}")
            found[way, key] = float(np.max([np.abs(a - b).max() for a, b in pairs]))
    return found


def answers(ours: LM, rows: Mapping[str, Row]) -> dict[str, Said]:
    """What we answer in every way to ask, by what has to be the same: a row alone, or the row called there."""
    prompt, short = rows["prompt"], {name: row for name, row in rows.items() if name != "prompt"}
    found: dict[str, Said] = {f"a prompt of {len(prompt['token_ids'])} tokens": {"prompt": alone(ours, prompt)}}
    for side in ("left", "right"):
        found[f"padded on the {side}"] = dict(zip(short, padded(ours, [*short.values()], side)))
    found["packed into one row"] = dict(zip(short, packed(ours, [*short.values()])))
    if ours.blueprint.kind != "encoder":
        found["cached"] = {"cached": {"logits": cached(ours, prompt)}}
    return found | {"exported": {"exported": next(iter(found.values()))["prompt"]}}


def rows(ours: LM) -> dict[str, Row]:
    """What is asked: a prompt and two short rows, of ids that are no padding in any family."""
    rng, c, found = np.random.default_rng(0), ours.blueprint.config, {}
    for name, (length, written) in SIZES.items():
        length = min(length, c.context)
        row = dict(token_ids=rng.integers(3, c.vocab, length))
        if ours.blueprint.kind == "encoder-decoder":
            row["decoder_ids"] = rng.integers(3, c.vocab, written)
        if getattr(c, "types", 0) > 1:
            row["types"] = (np.arange(length) >= length // 2).astype(int)
        found[name] = row
    return found


def alone(ours: LM, row: Row) -> Answers:
    """Our answers to one row."""
    return {key: x[0] for key, x in _batch(ours, **row).items()}


def padded(ours: LM, rows: Sequence[Row], side: str) -> list[Answers]:
    """Our answers to rows that are padded on one side to the length of the longest; what a decoder reads, on the right.

    Without the pooled state where the first token of a row is padding.
    """

    def pad(key: str, real: bool = False) -> np.ndarray:
        most = max(len(row[key]) for row in rows)
        at = dict(left=lambda n: (most - n, 0), right=lambda n: (0, most - n))[
            "right" if key == "decoder_ids" else side
        ]
        return np.stack([np.pad(np.ones_like(row[key]) if real else row[key], at(len(row[key]))) for row in rows])

    batch = {key: pad(key) for key in rows[0]} | dict(mask=pad("token_ids", real=True))
    if "decoder_ids" in batch:
        batch["decoder_mask"] = pad("decoder_ids", real=True)
    real = dict(logits=batch.get("decoder_mask", batch["mask"]), hidden=batch["mask"])
    out = _batch(ours, **batch)
    if side == "left":
        out.pop("pooled", None)
    return [{key: x[i][real[key][i] == 1] if key in real else x[i] for key, x in out.items()} for i in range(len(rows))]


def packed(ours: LM, rows: Sequence[Row]) -> Sequence[Answers]:
    """Our answers to rows that stand in one, apart by their segments; without the pooled states."""
    lengths = {key: [len(row[key]) for row in rows] for key in rows[0]}
    joined = {key: np.concatenate([row[key] for row in rows])[None] for key in rows[0]}
    segments = {key: np.repeat([range(1, len(rows) + 1)], lengths[key], axis=1) for key in rows[0]}
    given: list[Any] = [joined["token_ids"], segments["token_ids"]]
    if "decoder_ids" in joined:
        given += [joined["decoder_ids"], segments["decoder_ids"]]
        ask = dict(
            logits=lambda m, tokens, s, decoder, t: m(tokens, decoder, segments_BS=s, segments_BT=t)[0],
            hidden=lambda m, tokens, s, *_: m.encode(tokens, segments_BS=s),
        )
    else:
        given += [{"types_BT": joined["types"]} if "types" in joined else {}]
        ask = dict(
            logits=lambda m, tokens, s, more: m(tokens, segments_BT=s, **more)[0],
            hidden=lambda m, tokens, s, more: m.hidden(tokens, segments_BT=s, **more)[0],
        )
    out: list[Answers] = [{} for _ in rows]
    for key in (key for key in ask if key in _has(ours)):
        whole = np.asarray(_run(ours, ask[key], *given))[0]
        about = lengths["decoder_ids" if key == "logits" and "decoder_ids" in joined else "token_ids"]
        for answers, part in zip(out, np.split(whole, np.cumsum(about)[:-1])):
            answers[key] = part
    return out


def cached(ours: LM, row: Row) -> np.ndarray:
    """Our logits of a row, or of its decoder's, read in `parts` through the cache."""
    cache = ours.model.empty_cache(1, sum(map(len, parts(row))))
    if "decoder_ids" in row:
        tokens, real = row["token_ids"][None], np.ones((1, len(row["token_ids"])), int)
        about = lambda m, cache, tokens, real: m.remember(cache, m.encode(tokens, segments_BS=real), real)  # noqa: E731
        cache = _run(ours, about, cache, tokens, real)

    def read(m: Any, tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x_BTD, cache = m.hidden(tokens_BT, cache=cache)
        return m.head(x_BTD), cache

    step = jax.jit(lambda params, tokens_BT, cache: read(ours.blueprint.bind(params), tokens_BT, cache))
    out = []
    for part in parts(row):
        logits_BTV, cache = step(ours.params, part[None], cache)
        out.append(np.asarray(logits_BTV)[0])
    return np.concatenate(out)


def parts(row: Row) -> list[np.ndarray]:
    """How a row is read through the cache: the last tokens of a prompt one by one, or all that a decoder reads."""
    tokens, pair = row.get("decoder_ids", row["token_ids"]), "decoder_ids" in row
    return np.split(tokens, range(1 if pair else len(tokens) - CACHED, len(tokens)))


class Transformers:
    """A folder's model in torch, of a class of transformers; `lost` tells which keys it missed or did not know."""

    def __init__(self, folder: epath.PathLike, cls: str, kind: str):
        self._torch, library = _libraries()
        if not hasattr(library, cls):
            raise Mistake(f"transformers {library.__version__} has no {cls}, which {folder} is a model of")
        how = dict(dtype=self._torch.float32, attn_implementation="eager", ignore_mismatched_sizes=True)
        self._kind = kind
        self._model, told = getattr(library, cls).from_pretrained(str(folder), **how, output_loading_info=True)
        # A class with a head need not have the pooled state, and the class without heads has it.
        self._body = library.AutoModel.from_pretrained(str(folder), **how) if kind == "encoder" else None
        self.lost: set[str] = {
            f"{fault} {key if isinstance(key, str) else key[0]!r}"
            for fault in ("missing", "unexpected", "mismatched") for key in told[f"{fault}_keys"]
        }  # fmt: skip

    def _ask(self, model: Any, **given: Any) -> Any:
        tensor = lambda x: self._torch.tensor(x[None]) if isinstance(x, np.ndarray) else x  # noqa: E731
        with self._torch.no_grad():
            return model.eval()(**{NAMES.get(name, name): tensor(x) for name, x in given.items()})

    def answers(self, rows: Mapping[str, Row]) -> dict[str, Answers]:
        """The answers to rows, each alone; and "cached", the prompt's again, in the `parts` that we read."""
        found = {name: self.answer(row) for name, row in rows.items()}
        return found | ({} if self._kind == "encoder" else {"cached": {"logits": self.cached(rows["prompt"])}})

    def answer(self, row: Row) -> Answers:
        """The answers to one row alone."""
        said = self._ask(self._model, **row)
        found = {"logits": next((said[key] for key in ("logits", "prediction_logits") if key in said), None)}
        if self._body is not None:
            body = self._ask(self._body, **row)
            found |= dict(hidden=body.last_hidden_state, pooled=body.get("pooler_output"))
        if self._kind == "encoder-decoder":
            found["hidden"] = said.encoder_last_hidden_state
        return {key: x[0].numpy() for key, x in found.items() if x is not None}

    def cached(self, row: Row) -> np.ndarray:
        """Logits of the row, or of its decoder's, read in `parts` through the cache."""
        takes = inspect.signature(self._model.forward).parameters
        cache = next(name for name in ("cache", "past_key_values") if name in takes)  # renamed in 5.24
        more, out, name = {cache: None}, [], "token_ids"
        if self._kind == "encoder-decoder":
            name = "decoder_ids"
            more["encoder_outputs"] = self._ask(self._model.get_encoder(), token_ids=row["token_ids"])
        for part in parts(row):
            said = self._ask(self._model, **{name: part}, **more, use_cache=True)
            more[cache] = said[cache]
            out.append(said.logits[0].numpy())
        return np.concatenate(out)


def _libraries() -> tuple[Any, Any]:
    try:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]
    except ImportError as e:
        raise Mistake(f"--check compares with transformers itself: pip install torch transformers ({e})") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def _has(ours: LM) -> set[str]:
    """The answers that a model has."""
    c, kind = ours.blueprint.config, ours.blueprint.kind
    has = dict(logits=getattr(c, "masked", True), hidden=kind != "decoder", pooled=getattr(c, "pooled", False))
    return {key for key, there in has.items() if there}


def _batch(ours: LM, **batch: np.ndarray) -> Answers:
    """What `LM` answers to a batch, or to one row."""
    about = {key: x for key, x in batch.items() if not key.startswith("decoder")}
    ways = dict(logits=(ours.logits, batch), hidden=(ours.hidden, about), pooled=(ours.pooled, about))
    return {key: ask(**given) for key, (ask, given) in ways.items() if key in _has(ours)}


def _run(ours: LM, ask: Any, *given: Any) -> Any:
    """What a function of our model gives, compiled."""
    return jax.jit(lambda params, *given: ask(ours.blueprint.bind(params), *given))(ours.params, *given)
