"""What a step costs on a TPU does not grow unnoticed: the compiler's own figures, against those that were recorded.

python -m tests.endurance.test_tpu_costs > tests/goldens/tpu_costs.json     after a change that is meant to cost
"""

import json
from pathlib import Path
import sys
from typing import Any

import jax
import pytest

from jaxlm import hlo, plan
from jaxlm.data.words import Words

RECORDED = Path(__file__).parents[1] / "goldens" / "tpu_costs.json"
MAY_GROW = 1.03
WIDE = dict(layers=4, width=512, heads=4)
STEPS: dict[str, tuple[dict[str, Any], str, dict[str, int]]] = {
    "llama fsdp 16": (dict(WIDE, name="llama", kv_heads=2, mlp_width=1536, remat="full"), "clm", dict(data=1, fsdp=16)),
    "gpt2 sequence 4": (dict(WIDE, name="gpt2", context=1024), "clm", dict(data=4, sequence=4)),
    "mixtral data, fsdp, tensor": (
        dict(WIDE, name="mixtral", kv_heads=4, mlp_width=768, experts=4, chosen=2), "clm",
        dict(data=2, fsdp=2, tensor=4),
    ),
    "bert tensor 4": (dict(WIDE, name="bert", mlp_width=2048, context=1024), "mlm", dict(data=4, tensor=4)),
    "t5 fsdp 16": (dict(WIDE, name="t5", mlp_width=1024), "span", dict(data=1, fsdp=16)),
}  # fmt: skip


def costs(name: str) -> dict[str, int]:
    """Estimated cycles, and bytes on a device at the peak, of one step."""
    model, objective, mesh = STEPS[name]
    config = dict(
        model=model, objective=dict(name=objective), optimizer=dict(name="adamw"), steps=10, batch=32, length=1024,
        mesh=mesh,
    )  # fmt: skip
    _, compiled = plan.compile_step(config, plan.devices("v5e:4x4"), words=Words.of_size(8192))
    memory = compiled.memory_analysis()
    assert memory is not None
    operations = hlo.read(compiled.as_text() or "")
    return dict(
        cycles=sum(op.times * op.cycles for op in operations),
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )


@pytest.mark.endurance
@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_no_more_than_was_recorded(name):
    version = getattr(pytest.importorskip("libtpu"), "__version__", "")
    recorded = json.loads(RECORDED.read_text())
    if recorded["libtpu"] != version:
        pytest.skip(f"recorded with libtpu {recorded['libtpu']}; this is {version}, whose figures differ")
    for what, now in costs(name).items():
        assert now <= MAY_GROW * recorded[name][what], f"{what} of {name}: {now:,}, {recorded[name][what]:,} recorded"


if __name__ == "__main__":
    import libtpu

    jax.config.update("jax_platforms", "cpu")
    json.dump({"libtpu": libtpu.__version__, **{name: costs(name) for name in STEPS}}, sys.stdout, indent=1)
    print()
