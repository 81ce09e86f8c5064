#!/usr/bin/env bash
# Cut the tiles of a finished tiling by sharpness, ink, empty glass or stain.
#   TILES=runs/tiles OUTPUT=runs/tiles_sharp bash tools/preprocess/filter-tiles.sh min_blur=80 max_pen=0.05 [key=value ...]
# TILES was made with quality=true. All keys: bash tools/preprocess/filter-tiles.sh --help
set -euo pipefail
: "${TILES:=}"
: "${OUTPUT:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.filter_tiles ${TILES:+tiles="$TILES"} ${OUTPUT:+output="$OUTPUT"} "$@"
