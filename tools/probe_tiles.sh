#!/usr/bin/env bash
# Probe encoders on labelled tiles: k-NN, linear and fine-tuning, always beside controls such as colour alone.
#   TILE_SET=tiles ENCODERS=resnet50,dino=runs/pretrain/backbone.pt OUTPUT=runs/probe bash tools/probe_tiles.sh [key=value ...]
# TILE_SET is a folder with one sub-folder of pictures per class, or a CSV; with FEATURES=<folders of bags>, a CSV of places on slides.
# All keys: bash tools/probe_tiles.sh --help
set -euo pipefail
: "${OUTPUT:=runs/probe}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys tile_set encoders[] features[] output
run_python patch_encoder.probe_tiles "${keys[@]}" "$@"
