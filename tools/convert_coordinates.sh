#!/usr/bin/env bash
# Convert tile coordinates from and to the layouts of CLAM, TRIDENT, AtlasPatch, STAMP, INTELLIGENS (.npy) and QuPath.
#   INPUT=runs/tiles TO=geojson OUTPUT=runs/geojson bash tools/convert_coordinates.sh
#   INPUT=clam/patches TO=ours OUTPUT=runs/tiles SLIDES=cohort/slides bash tools/convert_coordinates.sh
# All keys: bash tools/convert_coordinates.sh --help
set -euo pipefail
: "${OUTPUT:=runs/converted}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys input to output slides labels
run_python patch_encoder.convert_coordinates "${keys[@]}" "$@"
