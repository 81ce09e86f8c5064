#!/usr/bin/env bash
# Export a D2VFM student to ONNX, float32 and int8, each compared with the PyTorch student on the cohort's tiles.
#   SLIDES=cohort/slides COORDS=runs/tiles STUDENT=runs/d2vfm/checkpoint_best.pt OUTPUT=runs/export \
#     bash tools/export_student.sh [key=value ...]
# DATASET=runs/distillation takes its tiles in place of slides. All keys: bash tools/export_student.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${COORDS:=}"
: "${LABELS:=}"
: "${DATASET:=}"
: "${STUDENT:=}"
: "${OUTPUT:=runs/export}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python detection_kd.export_student ${SLIDES:+slides="$SLIDES"} ${COORDS:+coords="$COORDS"} ${LABELS:+labels="$LABELS"} \
  ${DATASET:+dataset="$DATASET"} ${STUDENT:+student="$STUDENT"} output="$OUTPUT" "$@"
