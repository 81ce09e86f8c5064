#!/usr/bin/env bash
# Train a D2VFM student on a distillation set (tools/preprocess/filter.sh writes one).
#   DATASET=runs/distillation BACKBONE=runs/detector/backbone.pt OUTPUT=runs/d2vfm GPUS=4 bash tools/distill.sh [key=value ...]
# All keys: bash tools/distill.sh --help
set -euo pipefail
: "${DATASET:=}"
: "${BACKBONE:=}"
: "${OUTPUT:=runs/d2vfm}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_module detection_kd.train_d2vfm ${DATASET:+dataset="$DATASET"} ${BACKBONE:+backbone="$BACKBONE"} output="$OUTPUT" "$@"
