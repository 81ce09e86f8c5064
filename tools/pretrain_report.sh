#!/usr/bin/env bash
# Write one HTML page about a pre-training run: curves, settings, views, attention, nearest neighbours, planes of features.
#   RUN=runs/pretrain bash tools/pretrain_report.sh [key=value ...]
# LABELS=labels.csv colours tiles by label, TILE_SET=tiles shows labelled pictures, too.
# All keys: bash tools/pretrain_report.sh --help
set -euo pipefail
: "${RUN:=}"
: "${OUTPUT:=${RUN:+$RUN/report}}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys run output slides coords labels tile_set
run_python patch_encoder.pretrain_report "${keys[@]}" "$@"
