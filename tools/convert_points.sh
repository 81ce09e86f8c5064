#!/usr/bin/env bash
# Convert annotated mitotic figures of any known set to a plain table, COCO or GeoJSON (QuPath), and count them by case and scanner.
#   ANNOTATIONS=MIDOG++.json CASES=configs/uts/midogpp_cases.csv OUTPUT=runs/midogpp bash tools/convert_points.sh
#   ANNOTATIONS=TUPAC_AL FORMAT=tupac16 IMAGES=data/tupac16 TO=geojson OUTPUT=runs/tupac16 bash tools/convert_points.sh
# All keys: bash tools/convert_points.sh --help
set -euo pipefail
: "${OUTPUT:=runs/points}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys data.annotations data.format data.images data.cases to output
run_python detection_kd.convert_points "${keys[@]}" "$@"
