"""Language models in JAX, from one config: `lm = jaxlm.load(WORKDIR)`, and the programs that `jaxlm --help` lists."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.lm import LM

# What a bucket holds is asked anew each time: a listing kept from before knows nothing of what TensorStore wrote since.
for _kind in ("gcs", "s3"):
    os.environ.setdefault(f"FSSPEC_{_kind.upper()}", '{"use_listings_cache": false}')  # read when fsspec is imported
    if "fsspec" in sys.modules:
        sys.modules["fsspec"].config.conf.setdefault(_kind, {}).setdefault("use_listings_cache", False)


def load(path: str, *, step: str | int = "newest", dtype: str = "auto", specials: bool = False) -> "LM":
    """The model of a workdir or of a Hugging Face folder: see `jaxlm.lm.load`."""
    from jaxlm import lm  # not before it is asked for: the programs that need no jax start fast

    return lm.load(path, step=step, dtype=dtype, specials=specials)
