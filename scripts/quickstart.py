"""The end of scripts/quickstart.sh: baselines on the same held-out text, three samples, summary.json and what to try
next.
"""

from collections.abc import Sequence
import json
from pathlib import Path
import sys
import time

from rich.console import Console
from rich.table import Table

from jaxlm import config, report
from jaxlm.data import store as stores
from jaxlm.models import ngram


def finish(workdir: str, began: float) -> dict[str, float]:
    """Complete WORKDIR/summary.json with the baselines and the total time, and print both beside the model's result."""
    path = Path(workdir) / "summary.json"
    summary = json.loads(path.read_text())
    if "ngram_bits_per_byte" not in summary:
        print("baselines: counting n-grams and compressing the held-out text")
        found = ngram.baselines(stores.open(config.read(workdir).store), "docs", orders=(2, 5))
        summary |= {
            f"{name}_bits_per_byte": found[key]
            for name, key in (("bigram", "2-gram"), ("ngram", "5-gram"), ("xz", "xz"))
        }
        summary["total_seconds"] = round(time.time() - began, 1)
        path.write_text(json.dumps(summary, indent=1) + "\n")
        report.write(workdir)
    return summary


def show(workdir: str, summary: dict[str, float]) -> None:
    """Print results, samples and the next commands."""
    table = Table(title="Bits per byte of held-out text (fewer is better)")
    table.add_column("predictor")
    table.add_column("bits per byte", justify="right")
    names = {"validation": "this model", "bigram": "2-gram", "ngram": "5-gram", "xz": "xz -9e"}
    rows = sorted((summary[f"{key}_bits_per_byte"], name) for key, name in names.items())
    for bits, name in rows:
        table.add_row(name, f"{bits:.3f}", style="bold" if name == "this model" else None)
    console = Console()
    console.print(table)
    for line in (Path(workdir) / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        console.rule(f"sample: {sample['prompt']!r}", align="left")
        console.print(sample["prompt"] + sample["text"], markup=False, highlight=False)
    console.rule()
    print(
        f"{summary['parameters']:,} parameters, trained in {summary['train_seconds']:.0f} s; "
        f"everything together {summary['total_seconds']:.0f} s"
    )
    print(f"""
What to try next (. .venv/bin/activate, or put .venv/bin/ in front):
  jaxlm generate --workdir={workdir} --prompt="Return the number of "
  jaxlm evaluate --workdir={workdir} --data=text:README.md
  jaxlm train --config=configs/quickstart.py --workdir={workdir}-longer --config.steps=6000
  jaxlm train --config=configs/pretrain/python_docs.py --workdir=runs/python_docs
and open {workdir}/report.html in a browser.""")


def main(argv: Sequence[str]) -> None:
    """quickstart.py WORKDIR SECONDS_SINCE_EPOCH: when the whole thing began."""
    workdir, began = argv
    show(workdir, finish(workdir, float(began)))


if __name__ == "__main__":
    main(sys.argv[1:])
