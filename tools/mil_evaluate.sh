#!/usr/bin/env bash
# Evaluate a finished benchmark, or any predictions: tables with intervals and DeLong tests, ROC, PR, reliability, screening.
#   BENCHMARK=runs/mil bash tools/mil_evaluate.sh [xlsx=true key=value ...]
#   PREDICTIONS=ours.csv,clam.csv OUTPUT=runs/compared bash tools/mil_evaluate.sh
# All keys: bash tools/mil_evaluate.sh --help
set -euo pipefail
: "${BENCHMARK:=}"
: "${PREDICTIONS:=}"
: "${OUTPUT:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python mil.evaluate ${BENCHMARK:+benchmark="$BENCHMARK"} ${PREDICTIONS:+predictions="[$PREDICTIONS]"} \
  ${OUTPUT:+output="$OUTPUT"} "$@"
