#!/usr/bin/env bash
# Draw tiles of a slide, or pictures, as stain normalisation and augmentation make them, one row a tile.
#   SLIDES=cohort/slides/S001.svs OUTPUT=preview.png bash tools/preprocess/stain-preview.sh [key=value ...]
# All keys: bash tools/preprocess/stain-preview.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${OUTPUT:=runs/stain_preview.png}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.stain_preview ${SLIDES:+slides="$SLIDES"} output="$OUTPUT" "$@"
