#!/usr/bin/env bash
# Encode every tile of a cohort with one encoder and write one feature bag per slide.
#   SLIDES=cohort/slides COORDS=runs/tiles ENCODER=gigapath bash tools/extract_features.sh [key=value ...]
# WEIGHTS=file uses local weights. GPUS=n starts n processes that share the cohort.
# All keys: bash tools/extract_features.sh --help
set -euo pipefail
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/features}"
: "${WORKERS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides coords output encoder weights labels workers
run_shards patch_encoder.extract_features "${keys[@]}" "$@"
