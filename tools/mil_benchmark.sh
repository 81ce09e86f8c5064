#!/usr/bin/env bash
# Compare feature sets: every slide classifier, seed and fold on each of them, with the same splits.
#   LABELS=cohort/labels.csv FEATURES=runs/features/teacher,runs/features/student OUTPUT=runs/mil bash tools/mil_benchmark.sh [key=value ...]
# CONFIG is the recipe. Trainings share the GPUS GPUs of this machine (default: all), WORKERS at a time on each;
# engine=ray runs them on a Ray cluster instead. All keys: bash tools/mil_benchmark.sh --help
set -euo pipefail
: "${LABELS:=}"
: "${FEATURES:=}"
: "${OUTPUT:=runs/mil}"
: "${WORKERS:=1}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/ts2gkd/mil_benchmark.yaml" "$@"
share_gpus "$@"
run_python mil.benchmark ${config[@]+"${config[@]}"} ${LABELS:+labels="$LABELS"} ${FEATURES:+features="[$FEATURES]"} \
  output="$OUTPUT" "${keys[@]}" "$@"
