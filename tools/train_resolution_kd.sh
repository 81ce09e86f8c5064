#!/usr/bin/env bash
# Train a network that grades patches (AT+): a teacher at full resolution, and with TEACHER_CHECKPOINT a student that sees ratio^2 times fewer pixels.
#   SOURCE=SICAPv2 FORMAT=sicapv2 OUTPUT=runs/at_plus/teacher GPUS=4 bash tools/train_resolution_kd.sh --config configs/at_plus/sicapv2.yaml
#   ... TEACHER_CHECKPOINT=runs/at_plus/teacher/checkpoint_best.pt RATIO=4 OUTPUT=runs/at_plus/student bash tools/train_resolution_kd.sh --config configs/at_plus/sicapv2.yaml terms.kd=1 terms.at_plus=10
# All keys: bash tools/train_resolution_kd.sh --help
set -euo pipefail

# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
: "${OUTPUT:=runs/at_plus/teacher}"
collect_keys data.source data.format data.fold teacher_checkpoint ratio output
run_module detection_kd.train_resolution_kd "${keys[@]}" "$@"
