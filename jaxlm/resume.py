"""Whether a workdir's run may be gone on with: the same model, tokenizer and training state.

check("runs/first", settings, [300, 600], store, blueprint.shapes)
Mistake: runs/first holds checkpoints of another run: config.model.width was 64 and is 128. Set it back, or choose ...
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from etils import epath
import jax

from jaxlm import config as configs
from jaxlm import lookup, optim
from jaxlm.data import tokenizers
from jaxlm.data.store import Store
from jaxlm.lookup import Mistake
from jaxlm.models import Tree, configured

FREE = ("attention", "remat", "dtype", "dropout")  # of config.model: how it is computed, on these devices


def check(workdir: str, settings: Mapping[str, Any], saved: list[int], store: Store, shapes: Tree) -> None:
    """Raise `Mistake` where a workdir holds checkpoints (of the steps `saved`) of another model, of another kind of
    training state, of none, or of one to which token ids mean something else.
    """
    if not saved or not (epath.Path(workdir) / "config.json").exists():
        return
    before = configs.read(workdir).to_dict()
    if "optimizer" not in before:
        raise Mistake(
            f"{workdir} was made by `jaxlm convert`: it holds weights to evaluate, generate and export with, and no "
            "run to go on with. Choose another --workdir; a run begins with parameters of its own"
        )
    if (epath.Path(workdir) / "tokenizer").exists():
        ours, given = (
            tok.fingerprint for tok in (tokenizers.load(epath.Path(workdir) / "tokenizer"), store.tokenizer())
        )
        if ours != given:
            raise Mistake(
                f"{workdir} holds checkpoints of a model that reads the tokenizer {ours}, and the store {store.path} "
                f"was made with {given}: the same ids would mean other tokens. Choose another --workdir or config.store"
            )
    now = json.loads(json.dumps(settings, default=dict))
    old, new = (_model(c["model"]) for c in (before, now))
    found: list[tuple[str, Any, Any]] = [(f"model.{key}", old[key], new.get(key)) for key in old]
    found += [("ema", bool(before["ema"]), bool(now["ema"]))]
    same = old == new
    old, new = ({"name": "adamw", **(c["optimizer"] or {})} for c in (before, now))
    if same:
        found += [(f"optimizer.{key}", old.get(key), new.get(key)) for key in _decisive(old, new, shapes)]
    for name, was, given in found:
        if was != given:
            raise Mistake(
                f"{workdir} holds checkpoints of another run: config.{name} was {was!r} and is {given!r}. "
                "Set it back, or choose another --workdir"
            )


def _model(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is, by name: its family's Config but for what is `FREE`, a size spelt out."""
    _, config = configured(section, vocab=1)
    told = {"name": section["name"], **dataclasses.asdict(config)}
    return {key: value for key, value in told.items() if key not in FREE}


def _decisive(before: Mapping[str, Any], now: Mapping[str, Any], shapes: Tree) -> list[str]:
    """The keys of `config.optimizer` whose change makes it keep something else between steps than it did."""

    def kept(section: Mapping[str, Any]) -> tuple[Any, Any]:
        free = {"schedule": "constant", "warmup": 0}  # which decide how fast, not what is kept
        tx, _ = lookup.spend("config.optimizer", optim.optimizer, {**section, **free}, shapes, steps=1)
        return jax.tree.flatten(jax.eval_shape(tx.init, shapes))

    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if "name" in changed:
        return ["name"]
    if not changed or kept(before) == kept(now):
        return []
    mixed = {key: {k: v for k, v in [*before.items(), (key, now.get(key))] if v is not None} for key in changed}
    return [key for key in changed if kept(mixed[key]) != kept(before)] or changed
