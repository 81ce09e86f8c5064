#!/usr/bin/env bash
# Adapters, losses, stages, pooling, K ...: every variant of D2VFM on one cohort, AUC with its interval beside its cost.
#   BASE=runs/quickstart bash tools/ablation.sh [--config FILE] [key=value ...]
# BASE is a finished quickstart, whose cohort, tiles, features and detector are taken (or give slides= labels= coords= features=
# backbone=). CONFIG lists default and factors; COMBINATIONS=full takes all combinations. Killed and started again, it goes on.
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
choose_config "$ROOT/configs/ablation/quickstart.yaml" "$@"
: "${BASE:=}"
: "${OUTPUT:=${BASE:-runs}/ablation}"
: "${COMBINATIONS:=one}"
keys=()
for stage in rank d2vfm mil; do
  default_key "${stage}_config" "$ROOT/configs/quickstart/$stage.yaml" "$@"
done
run_python studies.ablation ${config[@]+"${config[@]}"} ${BASE:+base="$BASE"} output="$OUTPUT" combinations="$COMBINATIONS" \
  "${keys[@]}" "$@"
