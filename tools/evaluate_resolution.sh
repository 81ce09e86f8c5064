#!/usr/bin/env bash
# Compare graders at several resolutions (AT+): metrics with intervals, differences run by run, costs, two speeds, attention maps, a page.
#   RUNS=runs/at_plus OUTPUT=runs/at_plus/comparison bash tools/evaluate_resolution.sh [key=value ...]
# All keys: bash tools/evaluate_resolution.sh --help
set -euo pipefail
: "${OUTPUT:=runs/at_plus/comparison}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys runs output
run_python detection_kd.evaluate_resolution "${keys[@]}" "$@"
