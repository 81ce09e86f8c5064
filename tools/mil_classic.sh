#!/usr/bin/env bash
# The classical MIL sets (Musk1, Musk2, Fox, Tiger, Elephant) by the published protocol: 10-fold cross-validation, 5 repeats.
#   DATA=../shared/data/mil_classic OUTPUT=runs/mil_classic bash tools/mil_classic.sh [key=value ...]
# WORKERS is the number of processes. All keys: bash tools/mil_classic.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
: "${DATA:=$ROOT/../shared/data/mil_classic}"
: "${OUTPUT:=runs/mil_classic}"
: "${WORKERS:=2}"
run_python mil.benchmark_classic data="$DATA" output="$OUTPUT" workers="$WORKERS" "$@"
