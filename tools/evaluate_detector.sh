#!/usr/bin/env bash
# Evaluate a trained detector on annotated images: COCO metrics, FROC, predictions, curves and pictures of hits and errors.
#   DETECTOR=runs/detector/checkpoint_best.pt ANNOTATIONS=detection/test.json IMAGES=detection/images OUTPUT=runs/evaluation \
#     bash tools/evaluate_detector.sh [key=value ...]
# All GPUs of the machine share the images. All keys: bash tools/evaluate_detector.sh --help
set -euo pipefail
: "${DETECTOR:=}"
: "${ANNOTATIONS:=}"
: "${IMAGES:=}"
: "${OUTPUT:=runs/evaluation}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_module detection_kd.evaluate_detector ${DETECTOR:+detector="$DETECTOR"} ${ANNOTATIONS:+annotations="$ANNOTATIONS"} \
  ${IMAGES:+images="$IMAGES"} output="$OUTPUT" "$@"
