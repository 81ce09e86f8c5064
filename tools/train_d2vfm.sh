#!/usr/bin/env bash
# Train a D2VFM student on a distillation set (tools/rank_patches.sh writes one).
#   DATASET=runs/distillation BACKBONE=runs/detector/backbone.pt OUTPUT=runs/d2vfm GPUS=4 bash tools/train_d2vfm.sh [key=value ...]
# All keys: bash tools/train_d2vfm.sh --help
set -euo pipefail
: "${OUTPUT:=runs/d2vfm}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys dataset backbone output
run_module detection_kd.train_d2vfm "${keys[@]}" "$@"
