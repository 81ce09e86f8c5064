#!/usr/bin/env bash
# Make a distillation set: rank the tiles of every training slide with a Mean-MIL on teacher features and keep the riskiest.
#   LABELS=cohort/labels.csv SLIDES=cohort/slides FEATURES=runs/features/teacher OUTPUT=runs/distillation \
#     bash tools/rank_patches.sh [key=value ...]
# CONFIG is the recipe, WORKERS the number of slides that are cut at a time.
# All keys: bash tools/rank_patches.sh --help
set -euo pipefail
: "${OUTPUT:=runs/distillation}"
: "${WORKERS:=2}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/ts2gkd/rank.yaml" "$@"
collect_keys labels slides features output workers
run_python mil.rank_patches ${config[@]+"${config[@]}"} "${keys[@]}" "$@"
