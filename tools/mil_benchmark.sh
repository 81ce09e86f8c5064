#!/usr/bin/env bash
# Compare feature sets: every slide classifier, seed and fold on each of them, with the same splits.
#   LABELS=cohort/labels.csv FEATURES=runs/features/teacher,runs/features/student OUTPUT=runs/mil bash tools/mil_benchmark.sh [key=value ...]
# CONFIG is the recipe, WORKERS the trainings at a time; with GPUS > 1 or NNODES > 1 in each of torchrun's processes, one a GPU.
# All keys: bash tools/mil_benchmark.sh --help
set -euo pipefail
: "${CONFIG:=$(dirname "${BASH_SOURCE[0]}")/../configs/ts2gkd/mil_benchmark.yaml}"
: "${LABELS:=}"
: "${FEATURES:=}"
: "${OUTPUT:=runs/mil}"
: "${WORKERS:=1}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_module mil.benchmark --config "$CONFIG" ${LABELS:+labels="$LABELS"} ${FEATURES:+features="[$FEATURES]"} \
  output="$OUTPUT" workers="$WORKERS" "$@"
