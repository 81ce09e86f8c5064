#!/usr/bin/env bash
# Measure what encoders and a student cost, all in one run: GFLOPs, parameters, tiles per second.
#   SLIDES=cohort/slides COORDS=runs/tiles STUDENT=runs/d2vfm/checkpoint_best.pt ENCODERS=resnet50,clip OUTPUT=runs/cost.json \
#     bash tools/measure_encoders.sh [key=value ...]
# All keys: bash tools/measure_encoders.sh --help
set -euo pipefail
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/encoder_cost.json}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys encoders[] student slides labels coords output
run_python studies.measure_encoders "${keys[@]}" "$@"
