#!/usr/bin/env bash
# List the encoders with width, input, resolution, licence and hub, or check one of them on this machine.
#   bash tools/list_encoders.sh                (kind=slide: the encoders of whole slides only)
#   bash tools/list_encoders.sh encoder=uni weights=UNI/pytorch_model.bin
# All keys: bash tools/list_encoders.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python patch_encoder.list_encoders "$@"
