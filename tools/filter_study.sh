#!/usr/bin/env bash
# Does leaving out hard tiles help? Teachers on wrong labels, their filters and students, and controls, on real mitotic figures.
#   CROPS=amibr_midog21 bash tools/filter_study.sh [--config FILE] [key=value ...]
# noise=MIDOG_systematic.json calls all look-alikes mitoses instead of random places. Killed and started again, it goes on.
# All keys: bash tools/filter_study.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/uts/filter_study.yaml" "$@"
: "${OUTPUT:=runs/filter_study}"
collect_keys crops
run_python studies.filter_study ${config[@]+"${config[@]}"} output="$OUTPUT" ${keys[@]+"${keys[@]}"} "$@"
