#!/usr/bin/env bash
# Build the pages of docs/ as HTML that opens from the disk; a warning, a dead link and a file from another host are errors.
#   bash tools/docs.sh                    to docs/build; open docs/build/index.html
#   OUTPUT=<folder> bash tools/docs.sh    to another folder. Arguments go to sphinx-build.
set -euo pipefail
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,4p' "${BASH_SOURCE[0]}" | cut -c3-
  exit 0
fi
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
: "${OUTPUT:=$ROOT/docs/build}"
"$PYTHON" -c 'import sphinx, myst_parser, furo' 2>/dev/null ||
  { echo "error: the packages of requirements-docs.txt are missing in $PYTHON; run: bash tools/setup.sh" >&2; exit 2; }
"$PYTHON" -m sphinx --builder html --fail-on-warning --keep-going --quiet "$@" "$ROOT/docs" "$OUTPUT"
"$PYTHON" "$ROOT/docs/check_pages.py" "$OUTPUT"
echo "docs: $OUTPUT/index.html"
