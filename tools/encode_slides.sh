#!/usr/bin/env bash
# Encode each slide's bag of tile features as one vector, with a slide encoder or a plain pool.
#   SLIDE_ENCODER=mean FEATURES=runs/features/uni2_h bash tools/encode_slides.sh [key=value ...]
#   SLIDE_ENCODER=chief WEIGHTS=CHIEF_pretraining.pth FEATURES=runs/features/ctranspath bash tools/encode_slides.sh
# GPUS=4 shares the slides between four processes; shard=i/n gives this one the i-th of n parts.
# The encoders, what they need and their licences: bash tools/list_encoders.sh kind=slide
# All keys: bash tools/encode_slides.sh --help
set -euo pipefail
: "${OUTPUT:=runs/slide_features}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys slide_encoder features output weights coords
run_shards patch_encoder.encode_slides "${keys[@]}" "$@"
