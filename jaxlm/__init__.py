"""Language models in JAX, from one config: `lm = jaxlm.load(WORKDIR)`, and the programs that `jaxlm --help` lists."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.lm import LM


def load(workdir: str, *, step: str | int = "newest") -> "LM":
    """The trained model of a workdir: see `jaxlm.lm`."""
    from jaxlm import lm  # not before it is asked for: the programs that need no jax start fast

    return lm.load(workdir, step=step)
