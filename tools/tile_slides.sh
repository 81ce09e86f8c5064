#!/usr/bin/env bash
# Find the tissue of every slide of a cohort and write the coordinates of its tiles.
#   SLIDES=cohort/slides OUTPUT=runs/tiles bash tools/tile_slides.sh [key=value ...]
# LABELS=labels.csv restricts the run to the slides listed there and supplies their mpp.
# All keys: bash tools/tile_slides.sh --help
set -euo pipefail
: "${OUTPUT:=runs/tiles}"
: "${WORKERS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides output labels workers
run_python patch_encoder.tile_slides "${keys[@]}" "$@"
