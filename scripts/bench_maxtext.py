"""What a TPU's compiler tells of MaxText's train step, as `jaxlm plan --json` tells of ours: one JSON object.

    pip install "maxtext[tpu]==0.2.5"      on Python 3.12, in an environment of its own; jaxlm on PYTHONPATH
    python scripts/bench_maxtext.py per_device_batch_size=3 [model_name=llama3.1-8b] [compile_topology=v6e-256] ...

Arguments are MaxText's own and replace what is set here. `estimated_cycles` are summed by the same reader as a plan's,
its kernels' not among them; bytes are the compiler's, of one device: `temp` and `argument` are set aside together.
"""

import json
import os
from pathlib import Path
import sys
from typing import Any

from jaxlm import hlo

SETTINGS = dict(
    run_name="plan", base_output_directory="/tmp/maxtext", dataset_type="synthetic", enable_checkpointing="false",
    skip_jax_distributed_system="true", compile_topology="v6e-256", compile_topology_num_slices="1",
    model_name="llama3.1-8b", max_target_length="8192", remat_policy="full",
)  # fmt: skip


def told(compiled: Any) -> dict[str, Any]:
    """Cycles and bytes of a compiled program."""
    memory = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")
    cycles = sum(op.times * op.cycles for op in hlo.read(compiled.as_text()))
    return dict(estimated_cycles=round(cycles)) | {name: getattr(memory, name) for name in names}


def main() -> None:
    """Have MaxText compile its step, and look at what comes of it."""
    for name, value in dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1").items():
        os.environ.setdefault(name, value)
    import jax
    import maxtext  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]

    found, own = [], jax.stages.Lowered.compile

    def kept(self: jax.stages.Lowered, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        compiled = own(self, *args, **kwargs)
        found.append(told(compiled))
        return compiled

    jax.stages.Lowered.compile = kept
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    base = Path(str(maxtext.__file__)).parent / "configs" / "base.yml"
    train_compile.main([sys.argv[0], str(base), *(f"{name}={value}" for name, value in (SETTINGS | given).items())])
    print(json.dumps(found[-1]))


if __name__ == "__main__":
    main()
