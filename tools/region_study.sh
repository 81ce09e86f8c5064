#!/usr/bin/env bash
# Tile mean, random encoder, DINO and SLPD's terms on simulated regions with known zones: one table with paired intervals.
#   bash tools/region_study.sh [--config FILE] [key=value ...]
# COHORT is a folder with labels.csv and zones.csv (or a rendered one), FEATURES that of its bags, in place of the simulated cohorts.
# Killed and started again, it goes on. All keys: bash tools/region_study.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/slpd/study.yaml" "$@"
: "${OUTPUT:=runs/region_study}"
collect_keys cohort features tile_encoder
default_key mil_config "$ROOT/configs/quickstart/mil.yaml" "$@"
run_python studies.region_study ${config[@]+"${config[@]}"} output="$OUTPUT" ${keys[@]+"${keys[@]}"} "$@"
