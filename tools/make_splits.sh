#!/usr/bin/env bash
# Make the splits of a cohort by patient, once, as files that CLAM and the trainings here read (splits=<folder>).
#   LABELS=cohort/labels.csv OUTPUT=cohort/splits bash tools/make_splits.sh [folds=5 inner_folds=4 repeats=3 key=value ...]
# check=true checks splits that are there already.
# All keys: bash tools/make_splits.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys labels output
run_python mil.make_splits "${keys[@]}" "$@"
