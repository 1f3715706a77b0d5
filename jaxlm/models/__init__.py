"""The model families, one file each; the folder is the registry (`config.model.name = "gpt2"` is `models/gpt2.py`).

model = models.Blueprint.of(dict(name="gpt2", layers=2), vocab=512)   nothing is allocated yet
params = model.init(seed=0, mesh=mesh, rules=axes.RULES)              a plain tree of arrays, placed by their names
logits_BTV, _ = model.bind(params)(tokens_BT)
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import os
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh

from jaxlm import axes, hf, lookup

Tree = Any  # nested dicts of arrays
COUNTS = {  # of a family's Config: 1 at least, where other numbers may be 0
    "vocab", "context", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "experts", "window", "every",
    "rope_base", "rope_base_local",
}  # fmt: skip
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json; left out, they would be a published model's


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its parameters: they live in a plain tree, and `bind` brings both together."""

    name: str
    config: Any
    graph: nnx.GraphDef
    shapes: Tree  # jax.ShapeDtypeStruct at every leaf

    @classmethod
    def of(cls, section: Mapping[str, Any], *, vocab: int, dtype: str = "float32") -> "Blueprint":
        """From `config.model`: a name, keys of that family's Config, and perhaps a `size` of its `SIZES` for the rest.

        Raises `Mistake` for a name, size or key that is not.
        """
        module, config = configured(section, vocab=vocab, dtype=dtype)
        if config.vocab < vocab:
            raise lookup.Mistake(f"the tokenizer has {vocab} ids, but config.model.vocab is {config.vocab}")
        graph, shapes = _traced(module.Model, config)
        return cls(module.__name__.rpartition(".")[2], config, graph, jax.tree.map(lambda x: x, shapes))

    def init(self, seed: int = 0, mesh: Mesh | None = None, rules: Mapping[str, Any] = axes.RULES) -> Tree:
        """Fresh float32 parameters, the same for every mesh; each device makes only what it holds."""
        make = functools.partial(lookup.module("jaxlm.models", self.name).Model, self.config)
        places = None if mesh is None else axes.shardings(self.shapes, mesh, rules)
        # A CPU runs this once: at full optimisation compiling it takes longer than all else before the first step.
        level = "xla_backend_optimization_level"
        free = axes.platform() == "cpu" and level not in os.environ.get("XLA_FLAGS", "")
        options = {level: 1} if free else None
        draw = lambda key: nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key))))  # noqa: E731
        return jax.jit(draw, out_shardings=places, compiler_options=options)(jax.random.key(seed))

    def bind(self, params: Tree) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)

    @property
    def kind(self) -> str:
        """What the family reads and writes: decoder, encoder or encoder-decoder."""
        return lookup.module("jaxlm.models", self.name).KIND

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.shapes))

    def flops_per_token(self, length: float) -> float:
        """Model FLOPs of one token's forward and backward pass: 6 a parameter that multiplies, and attention over
        `length` keys, where the family has heads. Of experts those count that a token is sent to; of an
        encoder-decoder, one token of each.

        PaLM's count (arXiv:2204.02311, appendix B), without a discount for the causal mask.
        """
        c = self.config
        attentions = c.layers
        if self.kind == "encoder-decoder":
            attentions += 2 * (c.decoder_layers or c.layers)
        idle = {"positions_TD"} | ({"embed_VD"} if "untied_VD" in self.shapes else set())
        active = self.size - sum(math.prod(self.shapes[name].shape) for name in idle & set(self.shapes))
        for path, x in jax.tree_util.tree_leaves_with_path(self.shapes):
            if (axes.of(axes.name_of(path)) or "").startswith("E"):
                active -= math.prod(x.shape) * (c.experts - c.chosen) // c.experts
        return 6 * active + (12 * attentions * c.heads * c.head_width * length if hasattr(c, "heads") else 0)


@functools.cache
def _traced(model: Any, config: Any) -> tuple[nnx.GraphDef, Tree]:
    """A model's graph and shapes, on whatever mesh; traced once, as programs ask for the same model again."""
    graph, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))


def configured(section: Mapping[str, Any], *, vocab: int, dtype: str = "float32") -> tuple[Any, Any]:
    """A family's module and its Config, from `config.model`. Raises as `Blueprint.of`."""
    section = dict(section)
    module = lookup.module("jaxlm.models", section.pop("name", "?"))
    if not hasattr(module, "Config"):
        raise lookup.Mistake(f"config.model.name: {module.__name__} is no family that can be trained by steps")
    if "size" in section:
        section = {**lookup.key("config.model.size", section.pop("size"), module.SIZES), **section}
    section = {"vocab": vocab, "dtype": dtype, **section}
    lookup.key("dtype", str(section["dtype"]), hf.DTYPES)
    _check({field.name: field.default for field in dataclasses.fields(module.Config)} | section)
    return module, lookup.spend("config.model", module.Config, section)


def apart(config: Any) -> bool:
    """Whether what a model makes of a row in training is the same whatever rows are beside it: dropout is drawn for
    all at once, and experts are kept evenly used by all.
    """
    return not config.dropout and not hasattr(config, "experts")


def _check(values: Mapping[str, Any]) -> None:
    """Raise `Mistake` for numbers of a family's Config that cannot be."""
    for name, value in values.items():
        if isinstance(value, int | float):
            lookup.within("config.model.", 1 if name in COUNTS else 0, **{name: value})
    if isinstance(share := values["dropout"], int | float) and share >= 1:
        raise lookup.Mistake(f"config.model.dropout={share} leaves nothing; it is a share below 1")
    heads = [("heads", "kv_heads")] + ([] if "head_width" in values else [("width", "heads")])
    for whole, part in heads:
        if isinstance(x := values.get(whole), int) and isinstance(y := values.get(part), int) and x % y:
            raise lookup.Mistake(f"config.model: {whole}={x} is no multiple of {part}={y}")


def of_hugging_face(folder: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], hf.Format]:
    """From a Hugging Face folder and its config.json: `config.model` of the family with its `model_type`, and how that
    is written.

    Raises `Mistake` for a model_type of no family, and for settings that the family does not have.
    """
    kind = config["model_type"]
    forms = {}
    for name in lookup.names(__name__):
        forms |= {k: (name, form) for k, form in getattr(lookup.module(__name__, name), "HF", {}).items()}
    name, form = lookup.key("model_type in config.json", kind, forms)
    try:
        return {"name": name, "vocab": config["vocab_size"], **form.read(config, hf.names(folder))}, form
    except KeyError as e:
        raise lookup.Mistake(f"{folder}/config.json has no {e}, which a {kind} needs") from e
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        raise lookup.Mistake(f"{folder}/config.json is not as a {kind} has it: {e}") from e


def to_hugging_face(blueprint: Blueprint) -> tuple[str, hf.Format, dict[str, Any]]:
    """The model_type that a model is exported as, how that is written, and its config.json, where ids of specials are
    None but for those that the model computes with.

    Raises `Mistake` where no model_type of transformers can express the model.
    """
    reasons = []
    for kind, form in getattr(lookup.module(__name__, blueprint.name), "HF", {}).items():
        try:
            cls = form.architecture if isinstance(form.architecture, str) else form.architecture(blueprint.config)
            config = {"model_type": kind, "architectures": [cls], "vocab_size": blueprint.config.vocab}
            config |= dict.fromkeys(IDS) | form.write(blueprint.config)
            found = form.read(config, hf.written(form, blueprint.shapes))
            again = lookup.spend("config.json", type(blueprint.config), found, vocab=blueprint.config.vocab)
        except lookup.Mistake as e:
            reasons.append(f"{kind}: {e}")
            continue
        free = {f.name for f in dataclasses.fields(again)} & {"attention", "remat", "dtype", "dropout"}
        differs = [
            f.name for f in dataclasses.fields(again)
            if f.name not in free and getattr(again, f.name) != getattr(blueprint.config, f.name)
        ]  # fmt: skip
        if not differs:
            return kind, form, config
        reasons.append(f"{kind} has no {', '.join(differs)}")
    raise lookup.Mistake(
        f"no model of transformers is this {blueprint.name}: {'; '.join(reasons) or 'it has no HF table'}"
    )
