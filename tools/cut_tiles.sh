#!/usr/bin/env bash
# Write the tiles of slides as pictures with a COCO list of them, for a detector of any other software.
#   SLIDES=cohort/slides COORDS=runs/tiles OUTPUT=runs/cut_tiles bash tools/cut_tiles.sh [key=value ...]
# All keys: bash tools/cut_tiles.sh --help
set -euo pipefail
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/cut_tiles}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords labels output
run_python detection_kd.cut_tiles "${keys[@]}" "$@"
