#!/usr/bin/env bash
# Convert annotated boxes or points of Pascal VOC, YOLO, QuPath (GeoJSON) or a plain table to COCO JSON.
#   BOXES=bccd/Annotations IMAGES=bccd/JPEGImages OUTPUT=runs/bccd bash tools/convert_annotations.sh layout=voc [key=value ...]
# All keys: bash tools/convert_annotations.sh --help
set -euo pipefail
: "${OUTPUT:=runs/annotations}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys boxes images output
run_python detection_kd.convert_annotations "${keys[@]}" "$@"
