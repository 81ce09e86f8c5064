#!/usr/bin/env bash
# Export a trained detector to ONNX, and compare the file with PyTorch on pictures.
#   DETECTOR=runs/detector/checkpoint_best.pt IMAGES=detection/images OUTPUT=runs/export_detector \
#     bash tools/export_detector.sh [key=value ...]
# All keys: bash tools/export_detector.sh --help
set -euo pipefail
: "${OUTPUT:=runs/export_detector}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys detector images output
run_python detection_kd.export_detector "${keys[@]}" "$@"
