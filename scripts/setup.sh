#!/usr/bin/env bash
# Make .venv and install jaxlm into it from a lock file:    scripts/setup.sh core | test | tpu
# A second call with nothing changed takes a moment. PYTHON=/path/to/python3.x chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=${1:-core}
venv=.venv/bin/python

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
usable() { new_enough $venv && $venv -c 'import pip' 2>/dev/null; }
locked() { cmp -s requirements/core.txt .venv/core.txt && cmp -s "requirements/$lock.txt" ".venv/$lock.txt"; }

find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    if new_enough "$python"; then echo "$python"; return; fi
    [[ $python != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is no Python 3.11 or newer"
  done
  die "needs Python 3.11 or newer, but python3 is $(python3 --version 2>&1 | head -n 1); PYTHON=/path/to/python3.12 names another"
}

pip_install() { # quiet, but a failure shows all that pip said
  if ! $venv -m pip install --quiet --no-input --disable-pip-version-check "$@" >.venv/install.log 2>&1; then
    cat .venv/install.log >&2
    die "pip failed, see above; the same command tries again"
  fi
}

[[ -f requirements/$lock.txt ]] || die "there is no requirements/$lock.txt; choices: $(cd requirements && echo *.txt)"
if usable && locked && cmp -s pyproject.toml .venv/pyproject.toml; then
  say ".venv is up to date with requirements/$lock.txt"
  exit
fi
SECONDS=0
if ! usable; then
  python=$(find_python)
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv || die "$python has no working venv module; on Debian or Ubuntu: apt install python3-venv"
fi
if ! locked; then
  say "installing $(grep -c '==' "requirements/$lock.txt") locked packages (one to three minutes)"
  pip_install --require-hashes -r "requirements/$lock.txt"
fi
pip_install --no-deps --no-build-isolation -e .
cp pyproject.toml requirements/core.txt .venv/ # what is installed now; every lock contains the core one
cp "requirements/$lock.txt" .venv/
say "done in $SECONDS s"
