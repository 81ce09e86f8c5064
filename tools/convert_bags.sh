#!/usr/bin/env bash
# Write feature bags in the layouts of STAMP and TRIDENT, for their classifiers and slide encoders, or as AnnData.
#   FEATURES=runs/features/uni2_h TO=stamp OUTPUT=runs/stamp bash tools/convert_bags.sh
#   FEATURES=runs/features/conch_v1_5 TO=trident OUTPUT=runs/trident bash tools/convert_bags.sh
#   FEATURES=runs/features/uni2_h TO=anndata SCORES=runs/heatmaps/scores OUTPUT=runs/h5ad bash tools/convert_bags.sh
# All keys: bash tools/convert_bags.sh --help
set -euo pipefail
: "${OUTPUT:=runs/converted_bags}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys features to output coords scores labels
run_python patch_encoder.convert_bags "${keys[@]}" "$@"
