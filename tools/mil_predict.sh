#!/usr/bin/env bash
# Predict the slides of another cohort with a trained classifier or all folds of a benchmark; with labels, validate it there.
#   RUN=runs/mil FEATURES=runs/other/resnet50 OUTPUT=runs/predicted bash tools/mil_predict.sh [key=value ...]
# LABELS is a table of slide_id and, where they are known, case_id and the labels. SLIDES with draw_heatmaps=true draws where the models looked.
# All keys: bash tools/mil_predict.sh --help
set -euo pipefail
: "${RUN:=runs/mil}"
: "${OUTPUT:=runs/predicted}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys run features output labels slides
run_python mil.predict "${keys[@]}" "$@"
