#!/usr/bin/env bash
# Drop tiles of a finished tiling by sharpness, ink, empty glass or stain, without reading a slide again.
#   TILING=runs/tiles OUTPUT=runs/tiles_sharp bash tools/filter_tiles.sh min_blur=80 max_pen=0.05 [key=value ...]
# TILING must have been made with quality=true.
# All keys: bash tools/filter_tiles.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys tiling output
run_python patch_encoder.filter_tiles "${keys[@]}" "$@"
