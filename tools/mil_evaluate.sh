#!/usr/bin/env bash
# Evaluate a finished benchmark, or any predictions: tables with intervals and tests, ROC, PR, reliability, screening.
#   BENCHMARK=runs/mil bash tools/mil_evaluate.sh [xlsx=true key=value ...]
#   PREDICTIONS=ours.csv,clam.csv OUTPUT=runs/compared bash tools/mil_evaluate.sh
# All keys: bash tools/mil_evaluate.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys benchmark predictions[] output
run_python mil.evaluate "${keys[@]}" "$@"
