#!/usr/bin/env bash
# Make the environment and run the whole default test suite. Arguments go to pytest: bash tools/test.sh tests/mil -k auc
# WORKERS says how many test files run at a time (default: cores, at most 8); WORKERS=0 runs all in one process.
set -euo pipefail
: "${ENV:=venv}"
: "${WORKERS:=$(($(nproc) < 8 ? $(nproc) : 8))}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,3p' "${BASH_SOURCE[0]}" | cut -c3-
  exit 0
fi
ENV="$ENV" bash "$root/tools/setup.sh"
# shellcheck source=tools/lib.sh
source "$root/tools/lib.sh"
cd "$root"
"$PYTHON" -m ruff check .
if ((WORKERS > 1)); then
  export OMP_NUM_THREADS=1 # every worker has one core
fi
"$PYTHON" -m pytest -m "not gpu and not slow" --numprocesses "$WORKERS" --dist loadfile --no-loadscope-reorder --durations=10 "$@"
