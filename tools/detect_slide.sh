#!/usr/bin/env bash
# Run a trained detector over a cohort and write COCO JSON and GeoJSON (for QuPath) per slide.
#   SLIDES=cohort/slides COORDS=runs/tiles DETECTOR=runs/detector/checkpoint_best.pt OUTPUT=runs/detections \
#     bash tools/detect_slide.sh [key=value ...]
# Overlapping tiles (tile_slides.sh overlap=0.25) keep lesions on the seams whole.
# All keys: bash tools/detect_slide.sh --help
set -euo pipefail
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/detections}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords detector output labels
run_shards detection_kd.detect_slide "${keys[@]}" "$@"
