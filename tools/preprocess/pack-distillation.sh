#!/usr/bin/env bash
# Pack a distillation set into one file for training: 90,000 pairs of small files choke a disk.
#   DATASET=runs/distillation OUTPUT=runs/distillation.h5 bash tools/preprocess/pack-distillation.sh [key=value ...]
# or straight from slides and teacher bags, 50 tiles a slide at random (ranking=<csv> takes the highest):
#   SLIDES=cohort/slides COORDS=runs/tiles FEATURES=runs/features/gigapath OUTPUT=runs/distillation.h5 \
#     bash tools/preprocess/pack-distillation.sh tiles=50 [key=value ...]
# All keys: bash tools/preprocess/pack-distillation.sh --help
set -euo pipefail
: "${DATASET:=}"
: "${SLIDES:=}"
: "${COORDS:=}"
: "${FEATURES:=}"
: "${LABELS:=}"
: "${OUTPUT:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [[ -n "$DATASET" ]]; then # SLIDES and the like may be set for the other stages
  SLIDES="" COORDS="" FEATURES="" LABELS=""
fi
run_python detection_kd.pack_distillation ${DATASET:+dataset="$DATASET"} ${SLIDES:+slides="$SLIDES"} ${COORDS:+coords="$COORDS"} \
  ${FEATURES:+features="$FEATURES"} ${LABELS:+labels="$LABELS"} ${OUTPUT:+output="$OUTPUT"} "$@"
