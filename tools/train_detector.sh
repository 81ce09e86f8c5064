#!/usr/bin/env bash
# Train the lesion detector (Deformable DETR) on COCO-format boxes. D2VFM uses its backbone.
#   TRAIN=detection/train.json VAL=detection/val.json IMAGES=detection/images OUTPUT=runs/detector GPUS=4 \
#     bash tools/train_detector.sh [key=value ...]
# CONFIG names other settings than the published ones.
# All keys: bash tools/train_detector.sh --help
set -euo pipefail
: "${OUTPUT:=runs/detector}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/ts2gkd/detector_r50.yaml" "$@"
collect_keys train val images output
run_module detection_kd.train_detector ${config[@]+"${config[@]}"} "${keys[@]}" "$@"
