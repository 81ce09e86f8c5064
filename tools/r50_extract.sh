#!/usr/bin/env bash
# Encode every tile of a cohort with a D2VFM student (the detector's ResNet with its adapter).
#   SLIDES=cohort/slides COORDS=runs/tiles STUDENT=runs/d2vfm/checkpoint_best.pt bash tools/r50_extract.sh [key=value ...]
# All keys: bash tools/r50_extract.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${COORDS:=runs/tiles}"
: "${STUDENT:=}"
: "${OUTPUT:=runs/features}"
: "${LABELS:=}"
: "${WORKERS:=8}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_shards detection_kd.extract_student ${SLIDES:+slides="$SLIDES"} coords="$COORDS" ${STUDENT:+student="$STUDENT"} \
  output="$OUTPUT" ${LABELS:+labels="$LABELS"} workers="$WORKERS" "$@"
