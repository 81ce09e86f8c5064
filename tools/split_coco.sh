#!/usr/bin/env bash
# Split one COCO annotation file into train, val and test: by lists of names, or at random by groups of images.
#   ANNOTATIONS=data/bccd/coco.json LISTS=data/bccd/ImageSets/Main OUTPUT=runs/bccd/annotations bash tools/split_coco.sh
# All keys: bash tools/split_coco.sh --help
set -euo pipefail
: "${OUTPUT:=runs/annotations}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys annotations lists output
run_python detection_kd.split_coco "${keys[@]}" "$@"
