#!/usr/bin/env bash
# Run the classical MIL sets (Musk1, Musk2, Fox, Tiger, Elephant) by the published protocol: 10-fold cross-validation, 5 repeats.
#   FOLDER=data/mil_classic OUTPUT=runs/mil_classic bash tools/benchmark_classic.sh [key=value ...]
# FOLDER is a folder with the sets' files; WORKERS is the number of processes.
# All keys: bash tools/benchmark_classic.sh --help
set -euo pipefail
: "${OUTPUT:=runs/mil_classic}"
: "${WORKERS:=2}"
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys folder output workers
run_python mil.benchmark_classic "${keys[@]}" "$@"
