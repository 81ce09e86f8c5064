#!/usr/bin/env bash
# Encode the regions of a cohort with a region encoder and write one feature bag per slide, a row per region.
#   WEIGHTS=runs/slpd REGIONS=runs/regions/uni2_h bash tools/extract_regions.sh [key=value ...]
# WEIGHTS is a run directory of pretrain_slpd or HIPT's vit4k_xs file; pool=mean writes one row per slide.
# All keys: bash tools/extract_regions.sh --help
set -euo pipefail
: "${OUTPUT:=runs/features}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys weights regions output
run_python patch_encoder.extract_regions "${keys[@]}" "$@"
