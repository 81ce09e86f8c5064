#!/usr/bin/env bash
# Make regions of G x G tiles from feature bags, for region encoders; no slide is read.
#   FEATURES=runs/features/uni2_h OUTPUT=runs/regions bash tools/build_regions.sh region_tiles=16 [key=value ...]
# All keys: bash tools/build_regions.sh --help
set -euo pipefail
: "${OUTPUT:=runs/regions}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys features output coords
run_python patch_encoder.build_regions "${keys[@]}" "$@"
