#!/usr/bin/env bash
# Find tissue and write tile coordinates for a cohort.
#   SLIDES=cohort/slides OUTPUT=runs/tiles bash tools/preprocess/tile-slides.sh [key=value ...]
# LABELS=labels.csv restricts to its slides and gives mpp. All keys: bash tools/preprocess/tile-slides.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${OUTPUT:=runs/tiles}"
: "${LABELS:=}"
: "${WORKERS:=8}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.tile_slides ${SLIDES:+slides="$SLIDES"} output="$OUTPUT" ${LABELS:+labels="$LABELS"} workers="$WORKERS" "$@"
