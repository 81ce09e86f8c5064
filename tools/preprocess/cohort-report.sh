#!/usr/bin/env bash
# One HTML page on a cohort: every slide with its tissue, tiles, quality, bags and errors.
#   TILES=runs/tiles OUTPUT=runs/tiles/report bash tools/preprocess/cohort-report.sh [key=value ...]
# FEATURES=runs/features/gigapath looks for a bag of every slide. All keys: bash tools/preprocess/cohort-report.sh --help
set -euo pipefail
: "${TILES:=}"
: "${OUTPUT:=${TILES:+$TILES/report}}"
: "${FEATURES:=}"
: "${LABELS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.cohort_report ${TILES:+tiles="$TILES"} ${OUTPUT:+output="$OUTPUT"} ${FEATURES:+features="[$FEATURES]"} ${LABELS:+labels="$LABELS"} "$@"
