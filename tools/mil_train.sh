#!/usr/bin/env bash
# Train one slide classifier on one feature folder and one fold; a benchmark trains many (tools/mil_benchmark.sh).
#   LABELS=cohort/labels.csv FEATURES=runs/features/student OUTPUT=runs/abmil bash tools/mil_train.sh model=abmil [key=value ...]
# All keys: bash tools/mil_train.sh --help
set -euo pipefail
: "${OUTPUT:=runs/classifier}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys labels features output
run_module mil.train "${keys[@]}" "$@"
