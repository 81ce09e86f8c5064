#!/usr/bin/env bash
# Build the compiled operators (deformable attention, dense and over sparse bags) ahead of time; does nothing when they are up to date.
#   bash tools/build_ops.sh                       CPU; CUDA too where nvcc and a CUDA torch are there
#   bash tools/build_ops.sh architectures=[90]    for these compute capabilities (else the GPUs here, else all)
# Logs: <package>/ops/build/*.log. All keys: bash tools/build_ops.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python wsi_common.ops.build "$@"
