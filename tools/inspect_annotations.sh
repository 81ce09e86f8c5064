#!/usr/bin/env bash
# Describe a detection set before training: counts, boxes per image against the queries, sizes, classes, leaks by patient.
#   TRAIN=detection/train.json VAL=detection/val.json IMAGES=detection/images OUTPUT=runs/inspection \
#     bash tools/inspect_annotations.sh group='^[^_]+' [key=value ...]
# All keys: bash tools/inspect_annotations.sh --help
set -euo pipefail
: "${OUTPUT:=runs/inspection}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys train val test images output
run_python detection_kd.inspect_annotations "${keys[@]}" "$@"
