#!/usr/bin/env bash
# Break slides, bags, checkpoints, tables, settings, disks and processes on purpose; one line a case, exit status 1 if one is not as expected.
#   bash tools/fault_drill.sh                      all cases
#   bash tools/fault_drill.sh match='bags|signals' those whose name matches
#   bash tools/fault_drill.sh table=drill.md       and the table as Markdown
# All keys: bash tools/fault_drill.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_python tests.fault_drill.drill "$@"
