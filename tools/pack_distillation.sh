#!/usr/bin/env bash
# Pack a distillation set into one file for training, because 90,000 pairs of small files choke a disk.
#   DATASET=runs/distillation OUTPUT=runs/distillation.h5 bash tools/pack_distillation.sh [key=value ...]
# Or pack tiles straight from slides and teacher bags, 50 random tiles per slide (ranking=<csv> takes the highest ranked):
#   SLIDES=cohort/slides COORDS=runs/tiles FEATURES=runs/features/gigapath OUTPUT=runs/distillation.h5 \
#     bash tools/pack_distillation.sh tiles_per_slide=50 [key=value ...]
# All keys: bash tools/pack_distillation.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ -n "${DATASET:-}" ]]; then # the other variables may be set for other stages
  unset SLIDES COORDS FEATURES LABELS
fi
collect_keys dataset slides coords features labels output
run_python detection_kd.pack_distillation "${keys[@]}" "$@"
