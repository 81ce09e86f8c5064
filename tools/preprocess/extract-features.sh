#!/usr/bin/env bash
# Encode every tile of a cohort with one encoder.
#   SLIDES=cohort/slides COORDS=runs/tiles ENCODER=gigapath bash tools/preprocess/extract-features.sh [key=value ...]
# WEIGHTS=file uses local weights. All keys: bash tools/preprocess/extract-features.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${COORDS:=runs/tiles}"
: "${OUTPUT:=runs/features}"
: "${ENCODER:=}"
: "${WEIGHTS:=}"
: "${LABELS:=}"
: "${WORKERS:=8}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_shards patch_encoder.extract_features ${SLIDES:+slides="$SLIDES"} coords="$COORDS" output="$OUTPUT" \
  ${ENCODER:+encoder="$ENCODER"} ${WEIGHTS:+weights="$WEIGHTS"} ${LABELS:+labels="$LABELS"} workers="$WORKERS" "$@"
