#!/usr/bin/env bash
# Make the environment and run the whole default test suite. Arguments go to pytest: bash tools/test.sh tests/mil -k auc
set -euo pipefail
: "${ENV:=venv}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2p' "${BASH_SOURCE[0]}" | cut -c3-
  exit 0
fi
ENV="$ENV" bash "$root/tools/setup.sh"
# shellcheck source=tools/lib.sh
source "$root/tools/lib.sh"
cd "$root"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -m "not gpu and not slow" --durations=10 "$@"
