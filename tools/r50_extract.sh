#!/usr/bin/env bash
# The name of this stage in TS2G-KD's own README; it runs tools/extract_student.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/extract_student.sh" "$@"
