#!/usr/bin/env bash
# Make the splits of a cohort by patient, once, as files that CLAM and the trainings here read (splits=<folder>).
#   LABELS=cohort/labels.csv OUTPUT=cohort/splits bash tools/mil_splits.sh [folds=5 inner_folds=4 repeats=3 key=value ...]
# check=true checks splits that are there. All keys: bash tools/mil_splits.sh --help
set -euo pipefail
: "${LABELS:=}"
: "${OUTPUT:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python mil.make_splits ${LABELS:+labels="$LABELS"} ${OUTPUT:+output="$OUTPUT"} "$@"
