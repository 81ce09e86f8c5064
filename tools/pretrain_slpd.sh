#!/usr/bin/env bash
# Pre-train a region encoder on regions of tile features, without labels (SLPD).
#   REGIONS=runs/regions/uni2_h LABELS=labels.csv OUTPUT=runs/slpd GPUS=4 bash tools/pretrain_slpd.sh --config configs/slpd/nsclc.yaml [key=value ...]
# STORE=redis reads them from a server that tools/load_redis.sh has filled, at REDIS_URL. Several machines: NNODES and RDZV_ENDPOINT, see
# tools/lib.sh. All keys: bash tools/pretrain_slpd.sh --help
set -euo pipefail
: "${OUTPUT:=runs/slpd}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys regions labels store output
run_module patch_encoder.pretrain_slpd "${keys[@]}" "$@"
