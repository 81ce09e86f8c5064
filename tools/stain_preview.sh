#!/usr/bin/env bash
# Draw tiles of a slide, or pictures, before and after stain normalisation and augmentation, one row per tile.
#   SLIDES=cohort/slides/S001.svs OUTPUT=preview.png bash tools/stain_preview.sh [key=value ...]
# All keys: bash tools/stain_preview.sh --help
set -euo pipefail
: "${OUTPUT:=runs/stain_preview.png}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides output
run_python patch_encoder.stain_preview "${keys[@]}" "$@"
