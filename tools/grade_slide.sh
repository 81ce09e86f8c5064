#!/usr/bin/env bash
# Grade whole biopsies at low resolution: map, share of each grade, Gleason score and ISUP group; with TEACHER_CHECKPOINT the least sure tiles again at full resolution.
#   SLIDES=biopsies GRADER=runs/at_plus/student/checkpoint_best.pt OUTPUT=runs/graded bash tools/grade_slide.sh [key=value ...]
# Tissue only: COORDS=runs/tiles of tile_slides.sh (overlap=0.5), else every pixel is looked at.
# All keys: bash tools/grade_slide.sh --help
set -euo pipefail
: "${OUTPUT:=runs/graded}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords grader teacher_checkpoint teacher_share output labels
run_shards detection_kd.grade_slide "${keys[@]}" "$@"
if (("${GPUS:-1}" > 1)); then # table and page of all parts together
  GPUS=1 run_shards detection_kd.grade_slide "${keys[@]}" "$@"
fi
