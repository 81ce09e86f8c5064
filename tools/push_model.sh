#!/usr/bin/env bash
# Share a trained model: a folder with weights, description and model card, pushed to a hub where the licences behind it permit.
#   RUN=runs/abmil_fold0 REPO=lab/cervix-abmil LICENCE=apache-2.0 OUTPUT=runs/shared/abmil bash tools/push_model.sh
#   RUN=runs/d2vfm OUTPUT=runs/shared/student bash tools/push_model.sh upload=false
# All keys: bash tools/push_model.sh --help
set -euo pipefail
: "${OUTPUT:=runs/shared/model}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys run repo licence output
run_python studies.push_model "${keys[@]}" "$@"
