#!/usr/bin/env bash
# Pre-train a patch encoder on slides without labels (INTELLIGENS).
#   SLIDES=cohort/slides COORDS=runs/tiles OUTPUT=runs/pretrain GPUS=8 bash tools/pretrain_dino.sh --config configs/intelligens/vits16.yaml [key=value ...]
# Several machines: NNODES and RDZV_ENDPOINT, see tools/lib.sh. All keys: bash tools/pretrain_dino.sh --help
set -euo pipefail
: "${OUTPUT:=runs/pretrain}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords output
run_module patch_encoder.pretrain_dino "${keys[@]}" "$@"
