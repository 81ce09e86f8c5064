#!/usr/bin/env bash
# The name of this stage in TS2G-KD's own README; it runs tools/train_d2vfm.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_d2vfm.sh" "$@"
