#!/usr/bin/env bash
# Let a teacher find the training tiles that are hard (UTS): writes kept.csv, which tools/train_mitosis.sh takes as KEPT.
#   ANNOTATIONS=MIDOG.json IMAGES=images CASES=cases.csv TEACHERS=runs/uts/teacher/checkpoint_best.pt OUTPUT=runs/uts/filter \
#     bash tools/filter_samples.sh [criterion=FP_TP mode=soft ...]
# TRUTH names annotations without the errors of ANNOTATIONS, where errors were put in. All keys: bash tools/filter_samples.sh --help
set -euo pipefail
: "${OUTPUT:=runs/uts/filter}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys data.annotations data.format data.images data.cases data.splits 'teachers[]' truth output
run_python detection_kd.filter_samples "${keys[@]}" "$@"
