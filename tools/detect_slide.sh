#!/usr/bin/env bash
# Run a trained detector over a cohort: COCO JSON and GeoJSON (QuPath) a slide.
#   SLIDES=cohort/slides COORDS=runs/tiles DETECTOR=runs/detector/checkpoint_best.pt OUTPUT=runs/detections \
#     bash tools/detect_slide.sh [key=value ...]
# Tiles that overlap (tile-slides.sh overlap=0.25) keep lesions on seams whole. All keys: bash tools/detect_slide.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${COORDS:=runs/tiles}"
: "${DETECTOR:=}"
: "${OUTPUT:=runs/detections}"
: "${LABELS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_shards detection_kd.detect_slide ${SLIDES:+slides="$SLIDES"} coords="$COORDS" ${DETECTOR:+detector="$DETECTOR"} \
  output="$OUTPUT" ${LABELS:+labels="$LABELS"} "$@"
