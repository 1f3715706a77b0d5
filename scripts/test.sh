#!/usr/bin/env bash
# The tests, on a CPU. Arguments go to pytest:    scripts/test.sh tests/test_axes.py -k fsdp    scripts/test.sh -m endurance
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test

# Compiled programs are kept between runs, keyed by program, JAX version and machine; JAX_COMPILATION_CACHE_DIR= (empty) does without.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-$PWD/.venv/cache/jax}"
export JAX_COMPILATION_CACHE_MAX_SIZE="${JAX_COMPILATION_CACHE_MAX_SIZE-4000000000}" # a limit also makes the cache lock its files
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS-0.3}"

parallel=(-n 2 --dist loadgroup --max-worker-restart=0) # xdist 3.8 may wait for ever once it has replaced a process that crashed
for argument in "$@"; do
  case $argument in
    -n* | --numprocesses* | --pdb | --trace | *::*) parallel=() ;; # the caller's own number, a debugger, or a single test
  esac
done
exec .venv/bin/python -m pytest ${parallel[@]+"${parallel[@]}"} "$@"
