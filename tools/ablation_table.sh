#!/usr/bin/env bash
# Write the table of an ablation as CSV, Markdown, JSON, figure and page; tools/ablation.sh does it at its end.
#   STUDY=runs/quickstart/ablation bash tools/ablation_table.sh [key=value ...]
# All keys: bash tools/ablation_table.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys study output
run_python studies.ablation_table "${keys[@]}" "$@"
