#!/usr/bin/env bash
# Encode every tile of a cohort with a D2VFM student (the detector's ResNet with its adapter).
#   SLIDES=cohort/slides COORDS=runs/tiles STUDENT=runs/d2vfm/checkpoint_best.pt bash tools/extract_student.sh [key=value ...]
# GPUS=n starts n processes that share the cohort.
# All keys: bash tools/extract_student.sh --help
set -euo pipefail
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/features}"
: "${WORKERS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords student output labels workers
run_shards detection_kd.extract_student "${keys[@]}" "$@"
