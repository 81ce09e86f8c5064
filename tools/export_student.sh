#!/usr/bin/env bash
# Export a D2VFM student to ONNX, float32 and int8, and compare each file with the PyTorch student on the cohort's tiles.
#   SLIDES=cohort/slides COORDS=runs/tiles STUDENT=runs/d2vfm/checkpoint_best.pt OUTPUT=runs/export \
#     bash tools/export_student.sh [key=value ...]
# DATASET=runs/distillation takes its tiles in place of slides.
# All keys: bash tools/export_student.sh --help
set -euo pipefail
: "${OUTPUT:=runs/export}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords labels dataset student output
run_python detection_kd.export_student "${keys[@]}" "$@"
