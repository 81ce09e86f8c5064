#!/usr/bin/env bash
# Show where a trained slide classifier looked: heatmaps, top tiles, and pages for a browser.
#   RUN=runs/mil SLIDES=cohort/slides OUTPUT=runs/heatmaps bash tools/heatmap.sh [key=value ...]
# RUN is a folder of mil.benchmark (its best feature set is drawn; feature_set=... takes another), or a run directory of mil.train together with FEATURES, its bags. OUTLINES holds the outlines of the tiling.
# All keys: bash tools/heatmap.sh --help
set -euo pipefail
: "${RUN:=runs/mil}"
: "${OUTPUT:=runs/heatmaps}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys run output slides features labels outlines
run_python mil.heatmap "${keys[@]}" "$@"
