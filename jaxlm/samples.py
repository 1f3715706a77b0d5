"""What a model writes when its training is done, for the report: `config.samples`.

samples = Samples(prompts=["Return a"], tokens=40)
samples.check(lm)                       before the first step: a Mistake for what could not be written in the end
samples.write(lm, "runs/first", 900)    runs/first/samples.jsonl: {"step": 900, "prompt": "Return a", "text": "..."}
"""

import dataclasses
import json

from etils import epath
import jax
from jax.sharding import Mesh

from jaxlm import axes, lookup
from jaxlm.lm import LM
from jaxlm.lookup import Mistake
from jaxlm.models import Tree


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which prompts are continued when all steps are done, by so many tokens and how, for the report.

    A prompt may name specials ("the <extra_id_0> of"); an encoder-decoder reads it as a text of its own.
    """

    prompts: list[str]
    tokens: int = 64
    temperature: float = 0.8
    seed: int = 0

    def check(self, lm: LM) -> None:
        """Raise `Mistake` for what this model could not write in the end."""
        if lm.blueprint.kind == "encoder":
            raise Mistake(f"config.samples: {lm.blueprint.name} is an encoder, which writes no text; leave them out")
        lookup.within("config.samples.", 1, tokens=self.tokens)
        lookup.within("config.samples.", 0, temperature=self.temperature)
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise Mistake(f"config.samples.prompts: {prompt!r} is no text")
            lm.prompt(prompt)

    def write(self, lm: LM, workdir: str, step: int) -> None:
        """Leave the texts in samples.jsonl."""
        texts = lm.generate(
            list(self.prompts), max_new_tokens=self.tokens, temperature=self.temperature, seed=self.seed
        )
        samples = [dict(step=step, prompt=prompt, text=text) for prompt, text in zip(self.prompts, texts)]
        (epath.Path(workdir) / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def on_one(params: Tree) -> tuple[Tree, Mesh | None]:
    """Parameters that every device holds whole, on one of them, and that one's mesh: others need not do the same work.
    Any others as they are.
    """
    arrays = jax.tree.leaves(params)
    if not all(x.is_fully_replicated for x in arrays):
        return params, None
    device = min(arrays[0].devices(), key=lambda device: device.id)
    return jax.device_put(params, device), axes.mesh(devices=[device])
