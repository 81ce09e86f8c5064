#!/usr/bin/env bash
# Convert tile coordinates from and to the layouts of CLAM, TRIDENT, AtlasPatch, STAMP, INTELLIGENS (.npy) and QuPath.
#   INPUT=runs/tiles TO=geojson OUTPUT=runs/geojson bash tools/preprocess/convert-coordinates.sh
#   INPUT=clam/patches TO=ours OUTPUT=runs/tiles SLIDES=cohort/slides bash tools/preprocess/convert-coordinates.sh
# All keys: bash tools/preprocess/convert-coordinates.sh --help
set -euo pipefail
: "${INPUT:=}"
: "${TO:=}"
: "${OUTPUT:=runs/converted}"
: "${SLIDES:=}"
: "${LABELS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.convert_coordinates ${INPUT:+input="$INPUT"} ${TO:+to="$TO"} output="$OUTPUT" \
  ${SLIDES:+slides="$SLIDES"} ${LABELS:+labels="$LABELS"} "$@"
