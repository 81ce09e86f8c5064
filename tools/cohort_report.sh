#!/usr/bin/env bash
# Write one HTML page about a cohort: every slide with its tissue, tiles, quality, bags and errors.
#   TILING=runs/tiles OUTPUT=runs/tiles/report bash tools/cohort_report.sh [key=value ...]
# FEATURES=runs/features/gigapath looks for a bag of every slide.
# All keys: bash tools/cohort_report.sh --help
set -euo pipefail
: "${TILING:=}"
: "${OUTPUT:=${TILING:+$TILING/report}}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys tiling output features[] labels
run_python patch_encoder.cohort_report "${keys[@]}" "$@"
