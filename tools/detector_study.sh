#!/usr/bin/env bash
# What does a change of the detector's recipe bring? Trainings of every change with several seeds: one table with paired intervals.
#   TRAIN=train.json VAL=val.json TEST=test.json IMAGES=images bash tools/detector_study.sh [--config FILE] [key=value ...]
# Killed and started again, it goes on. All keys: bash tools/detector_study.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/ts2gkd/detector_study.yaml" "$@"
: "${OUTPUT:=runs/detector_study}"
collect_keys train val test images recipe
default_key recipe "$ROOT/configs/ts2gkd/detector_bccd.yaml" "$@"
run_python studies.detector_study ${config[@]+"${config[@]}"} output="$OUTPUT" ${keys[@]+"${keys[@]}"} "$@"
