#!/usr/bin/env bash
# Compare detected mitoses with annotated ones: F1, AP, FROC per field, case and scanner with intervals, thresholds across scanners, figures.
#   DETECTIONS=runs/mitoses ANNOTATIONS=MIDOG.json IMAGES=images CASES=cases.csv OUTPUT=runs/evaluation bash tools/evaluate_mitosis.sh [key=value ...]
# DETECTIONS: output of detect_mitosis.sh, or <field>.json of the MIDOG challenge, or a table file,x,y,score.
# All keys: bash tools/evaluate_mitosis.sh --help
set -euo pipefail
: "${DETECTIONS:=runs/mitoses}"
: "${OUTPUT:=runs/mitosis_evaluation}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys detections data.annotations data.format data.images data.cases data.splits output
run_python detection_kd.evaluate_mitosis "${keys[@]}" "$@"
