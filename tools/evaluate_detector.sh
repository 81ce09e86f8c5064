#!/usr/bin/env bash
# Evaluate a trained detector on annotated images: COCO metrics, FROC, predictions, curves, and images of hits and errors.
#   DETECTOR=runs/detector/checkpoint_best.pt ANNOTATIONS=detection/test.json IMAGES=detection/images OUTPUT=runs/evaluation \
#     bash tools/evaluate_detector.sh [key=value ...]
# All GPUs of the machine share the images.
# All keys: bash tools/evaluate_detector.sh --help
set -euo pipefail
: "${OUTPUT:=runs/evaluation}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys detector annotations images output
run_module detection_kd.evaluate_detector "${keys[@]}" "$@"
