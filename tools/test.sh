#!/usr/bin/env bash
# Make the environment, then run ruff and the tests that need no process of their own and no whole training (under 8 minutes on 2 cores).
# --all as the first argument adds the others: whole trainings, pipelines, kills, pairs of processes, compilers.
# Other arguments go to pytest: bash tools/test.sh tests/mil -k auc
# WORKERS says how many test files run at a time (default: cores, at most 8); WORKERS=0 runs all in one process.
set -euo pipefail
: "${ENV:=venv}"
: "${WORKERS:=$(($(nproc) < 8 ? $(nproc) : 8))}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lane="not gpu and not slow and not process"
case "${1:-}" in
  --help | -h)
    sed -n '2,5p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
    ;;
  --all)
    lane="not gpu and not slow"
    shift
    ;;
esac
ENV="$ENV" bash "$root/tools/setup.sh"
# shellcheck source=tools/lib.sh
source "$root/tools/lib.sh"
cd "$root"
"$PYTHON" -m ruff check .
# files of tests lie in memory where 8 GiB are free there and libraries may be loaded from it: a disk waits for each of thousands
memory=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1 || true)
if [[ -z "${TMPDIR:-}" && "${memory:-0}" -gt $((8 << 20)) && "$(findmnt -no OPTIONS /dev/shm 2>/dev/null)" != *noexec* ]]; then
  TMPDIR=$(mktemp -d /dev/shm/tests.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
if ((WORKERS > 1)); then
  export OMP_NUM_THREADS=1 # every worker has one core
fi
export PYTHONDONTWRITEBYTECODE= # tests are compiled once for all workers and the next run
"$PYTHON" -m pytest -m "$lane" --numprocesses "$WORKERS" --dist loadfile --no-loadscope-reorder --durations=10 "$@"
