#!/usr/bin/env bash
# From detector to slide: slide-level scores from detect_slide's output, in the benchmark's table, and bags with two more columns.
#   DETECTIONS=runs/detections LABELS=cohort/labels.csv BENCHMARK=runs/mil CHANNEL=runs/features/student OUTPUT=runs/mil_detections \
#     bash tools/mil_from_detections.sh [key=value ...]
# BENCHMARK and CHANNEL may be left out. All keys: bash tools/mil_from_detections.sh --help
set -euo pipefail
: "${DETECTIONS:=runs/detections}"
: "${LABELS:=}"
: "${BENCHMARK:=}"
: "${CHANNEL:=}"
: "${OUTPUT:=runs/mil_detections}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python mil.classify_detections detections="$DETECTIONS" ${LABELS:+labels="$LABELS"} ${BENCHMARK:+benchmark="$BENCHMARK"} \
  ${CHANNEL:+channel="$CHANNEL"} output="$OUTPUT" "$@"
