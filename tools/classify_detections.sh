#!/usr/bin/env bash
# Turn detections into slide-level scores in the benchmark's table, and into feature bags with two more columns.
#   DETECTIONS=runs/detections LABELS=cohort/labels.csv BENCHMARK=runs/mil CHANNEL=runs/features/student OUTPUT=runs/mil_detections \
#     bash tools/classify_detections.sh [key=value ...]
# BENCHMARK and CHANNEL may be left out.
# All keys: bash tools/classify_detections.sh --help
set -euo pipefail
: "${DETECTIONS:=runs/detections}"
: "${OUTPUT:=runs/mil_detections}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys detections labels benchmark channel output
run_python mil.classify_detections "${keys[@]}" "$@"
