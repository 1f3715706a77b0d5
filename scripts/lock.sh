#!/usr/bin/env bash
# Pin every dependency, with hashes, for every supported Python and system:    scripts/lock.sh [--upgrade]
# Needs `uv` (pip install uv) and the index that your own configuration of it names; none is written to the files.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
  uv pip compile pyproject.toml --quiet --universal --python-version=3.11 --generate-hashes --group=build \
    --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command=scripts/lock.sh "$@"
}
# The larger set first: what its packages agree on is what the core is pinned to.
lock --output-file=requirements/test.txt --extra=test "$@"
lock --output-file=requirements/core.txt --constraint=requirements/test.txt "$@"
lock --output-file=requirements/tpu.txt --constraint=requirements/test.txt --extra=tpu --extra=gcs "$@" # TPU VMs
