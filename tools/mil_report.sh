#!/usr/bin/env bash
# Write one HTML page about a benchmark that can be sent around, and its figures as JSON.
#   BENCHMARK=runs/mil SLIDES=cohort/slides OUTPUT=runs/report bash tools/mil_report.sh [key=value ...]
# All keys: bash tools/mil_report.sh --help
set -euo pipefail
: "${BENCHMARK:=runs/mil}"
: "${OUTPUT:=runs/report}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys benchmark slides labels coords output
run_python mil.report "${keys[@]}" "$@"
