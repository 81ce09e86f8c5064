#!/usr/bin/env bash
# From slides to features: tiles of the encoder's own size and resolution, then one feature bag per slide. No labels are needed.
#   SLIDES=cohort/slides ENCODER=uni2_h OUTPUT=runs/features bash tools/slides_to_features.sh [key=value ...]
# WEIGHTS=file uses local weights. GPUS=n starts n processes that share the cohort. Started again, it goes on.
# All keys: bash tools/slides_to_features.sh --help
set -euo pipefail
: "${OUTPUT:=runs/features}"
: "${WORKERS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides output encoder weights labels workers
run_shards patch_encoder.slides_to_features "${keys[@]}" "$@"
