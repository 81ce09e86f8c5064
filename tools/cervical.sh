#!/usr/bin/env bash
# Real cervical cytology through TS2G-KD, three times: stain normalised, grey, and with the colours that the pictures came with.
#
#   DATA=<folder> bash tools/cervical.sh
#
# DATA holds the labelled fields of Mendeley zddtpgzv63 in any tree, under their published names: NL_12_ (3).jpg, HSIL_1 (10).jpg, ...
# LOOKS="reinhard grey none" are the runs; each is a quickstart with that look, below RUN (default runs/cervical), and takes four
# minutes on two CPU cores with AVX-512 and bf16, about ten on others. $RUN/cervical.md has their tables. Started again, it goes on;
# sizes are set as for quickstart.sh.
set -euo pipefail

main() {
  : "${DATA:=}"
  : "${RUN:=runs/cervical}"
  : "${LOOKS:=reinhard grey none}"
  : "${FIELDS:=}"
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
  fi
  if [[ $# -gt 0 || -z "$DATA" ]]; then
    echo "error: cervical.sh: expected DATA=<folder of labelled fields> and no arguments; see --help" >&2
    exit 2
  fi
  for look in $LOOKS; do
    echo "== look $look"
    DATA="$DATA" RUN="$RUN/$look" FIELDS="look=$look $FIELDS" bash "$root/tools/quickstart.sh"
  done
  for look in $LOOKS; do
    printf '## %s\n\n%s\n\n' "$look" "$(cat "$RUN/$look/mil/summary.md")"
  done >"$RUN/cervical.md"
  echo "cervical: tables in $RUN/cervical.md, one report per look in $RUN/<look>/report.html"
}

main "$@"
exit
