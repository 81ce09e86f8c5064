#!/usr/bin/env bash
# Report what the readers make of a slide, or of every slide of a folder: format, levels, mpp, tiles, whether it decodes.
#   SLIDES=cohort/slides bash tools/inspect_slides.sh [key=value ...]
#   SLIDES=cohort/slides/S001.svs bash tools/inspect_slides.sh target_mpp=0.25 sample=100
# All keys: bash tools/inspect_slides.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides labels
run_python patch_encoder.inspect_slides "${keys[@]}" "$@"
