#!/usr/bin/env bash
# Make a distillation set: rank the tiles of every training slide with a Mean-MIL on teacher features, keep the riskiest.
#   LABELS=cohort/labels.csv SLIDES=cohort/slides FEATURES=runs/features/teacher OUTPUT=runs/distillation bash tools/preprocess/filter.sh [key=value ...]
# CONFIG is the recipe, WORKERS the slides cut at a time. All keys: bash tools/preprocess/filter.sh --help
set -euo pipefail
: "${CONFIG:=$(dirname "${BASH_SOURCE[0]}")/../../configs/ts2gkd/rank.yaml}"
: "${LABELS:=}"
: "${SLIDES:=}"
: "${FEATURES:=}"
: "${OUTPUT:=runs/distillation}"
: "${WORKERS:=2}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python mil.rank_patches --config "$CONFIG" ${LABELS:+labels="$LABELS"} ${SLIDES:+slides="$SLIDES"} \
  ${FEATURES:+features="$FEATURES"} output="$OUTPUT" workers="$WORKERS" "$@"
