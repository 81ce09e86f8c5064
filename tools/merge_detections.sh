#!/usr/bin/env bash
# Put the COCO results of any detector on the tiles of cut_tiles together to detections of slides.
#   RESULTS=found.json TILES_LIST=runs/cut_tiles/tiles.json ANNOTATIONS=train.json COORDS=runs/tiles OUTPUT=runs/detections \
#     bash tools/merge_detections.sh [key=value ...]
# All keys: bash tools/merge_detections.sh --help
set -euo pipefail
: "${OUTPUT:=runs/detections}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys results tiles_list annotations coords output
run_python detection_kd.merge_detections "${keys[@]}" "$@"
