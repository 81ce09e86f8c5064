#!/usr/bin/env bash
# Write one HTML page on region features: slides like this one with matched regions side by side, and the prototypes of slides.
#   FEATURES=runs/features/slpd SLIDES=cohort/slides bash tools/region_report.sh [key=value ...]
# LABELS=labels.csv keeps patients apart and marks neighbours with the same label; show=[slide1,slide2] names the slides.
# RUN=runs/slpd, the run directory of pretrain_slpd, adds the curves of the training.
# All keys: bash tools/region_report.sh --help
set -euo pipefail
: "${FEATURES:=}"
: "${OUTPUT:=${FEATURES:+$FEATURES/report}}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys features slides output labels run
run_python patch_encoder.region_report "${keys[@]}" "$@"
