#!/usr/bin/env bash
# Train the atypical-figure head on crops of mitotic figures (AMi-Br) and test it slide by slide.
#   CROPS=data/amibr_midog21 OUTPUT=runs/atypical bash tools/train_atypical.sh [key=value ...]
# LOCALISER=runs/uts/student/checkpoint_best.pt starts from a trained localiser's trunk.
# CONFIG names other settings.
# All keys: bash tools/train_atypical.sh --help
set -euo pipefail
: "${OUTPUT:=runs/atypical}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/uts/atypical.yaml" "$@"
collect_keys crops localiser output
run_python detection_kd.train_atypical ${config[@]+"${config[@]}"} "${keys[@]}" "$@"
