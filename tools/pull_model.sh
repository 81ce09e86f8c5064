#!/usr/bin/env bash
# Fetch a model that was shared with push_model.sh from a hub, and check every file of it.
#   REPO=lab/cervix-abmil OUTPUT=models/cervix bash tools/pull_model.sh
# All keys: bash tools/pull_model.sh --help
set -euo pipefail
: "${OUTPUT:=models/pulled}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys repo output revision
run_python studies.pull_model "${keys[@]}" "$@"
