#!/usr/bin/env bash
# Where a trained slide classifier looked: heatmaps, top tiles and pages to look through the cohort in a browser.
#   RUN=runs/mil SLIDES=cohort/slides OUTPUT=runs/heatmaps bash tools/heatmap.sh [key=value ...]
# RUN is a folder of mil.benchmark, or a run directory of mil.train and then FEATURES its bags; TISSUE the outlines of the tiling.
# All keys: bash tools/heatmap.sh --help
set -euo pipefail
: "${RUN:=runs/mil}"
: "${SLIDES:=}"
: "${FEATURES:=}"
: "${LABELS:=}"
: "${TISSUE:=}"
: "${OUTPUT:=runs/heatmaps}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python mil.heatmap run="$RUN" output="$OUTPUT" ${SLIDES:+slides="$SLIDES"} ${FEATURES:+features="$FEATURES"} \
  ${LABELS:+labels="$LABELS"} ${TISSUE:+tissue="$TISSUE"} "$@"
