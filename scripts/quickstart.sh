#!/usr/bin/env bash
# From nothing to a trained, evaluated language model that writes, in ten minutes on two CPU cores.
# Run again, it says what is already done and goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$(date +%s)
scripts/setup.sh core

jaxlm=.venv/bin/jaxlm
$jaxlm prepare --config=configs/quickstart.py
$jaxlm train --config=configs/quickstart.py --workdir=runs/quickstart
.venv/bin/python scripts/quickstart.py runs/quickstart "$began" # baselines, samples, summary.json, what to try next
