"""Language models in JAX, from one config: `lm = jaxlm.load(WORKDIR)`, and the programs that `jaxlm --help` lists."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.lm import LM


def load(path: str, *, step: str | int = "newest", dtype: str = "auto", specials: bool = False) -> "LM":
    """The model of a workdir or of a Hugging Face folder: see `jaxlm.lm.load`."""
    from jaxlm import lm  # not before it is asked for: the programs that need no jax start fast

    return lm.load(path, step=step, dtype=dtype, specials=specials)
