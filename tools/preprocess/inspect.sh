#!/usr/bin/env bash
# Say what the readers make of a slide, or of every slide of a folder: format, levels, mpp, tiles, whether it decodes.
#   SLIDES=cohort/slides bash tools/preprocess/inspect.sh [key=value ...]
#   SLIDES=cohort/slides/S001.svs bash tools/preprocess/inspect.sh target_mpp=0.25 sample=100
# All keys: bash tools/preprocess/inspect.sh --help
set -euo pipefail
: "${SLIDES:=}"
: "${LABELS:=}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_python patch_encoder.inspect_slides ${SLIDES:+slides="$SLIDES"} ${LABELS:+labels="$LABELS"} "$@"
