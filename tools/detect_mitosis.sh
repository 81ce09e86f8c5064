#!/usr/bin/env bash
# Find mitoses on slides and fields, count them per mm2 and in hot spots; GeoJSON for QuPath, JSON of the MIDOG challenge, a table, a page.
#   SLIDES=fields LOCALISER=runs/student/checkpoint_best.pt OUTPUT=runs/mitoses bash tools/detect_mitosis.sh [key=value ...]
# Whole slides: COORDS=runs/tiles of tile_slides.sh (overlap=0.25), else every pixel is looked at.
# All keys: bash tools/detect_mitosis.sh --help
set -euo pipefail
: "${OUTPUT:=runs/mitoses}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords localiser output labels cases
run_shards detection_kd.detect_mitosis "${keys[@]}" "$@"
if (("${GPUS:-1}" > 1)); then # counts and page of all parts together
  GPUS=1 run_shards detection_kd.detect_mitosis "${keys[@]}" "$@"
fi
