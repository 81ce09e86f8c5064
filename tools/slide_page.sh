#!/usr/bin/env bash
# Write pages to look through slides and results, which open from a disk without a server.
#   SLIDES=cohort/slides OUTLINES=runs/tiles/tissue HEAT=runs/report/heatmaps OUTPUT=runs/pages bash tools/slide_page.sh [key=value ...]
# DETECTIONS, MITOSES and GRADE_MAPS are the output folders of those stages. Stopped and started again, it goes on where it was.
# All keys: bash tools/slide_page.sh --help
set -euo pipefail
: "${OUTPUT:=runs/pages}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slides labels output outlines heat detections mitoses grade_maps tables[]
run_python patch_encoder.slide_page "${keys[@]}" "$@"
