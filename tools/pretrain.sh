#!/usr/bin/env bash
# INTELLIGENS from slides to a table, on 2 CPU cores in minutes: pre-train a small network on the embedded cohort (which it renders
# itself, no download), take its features, and compare slide classifiers on them with those on its random start and on mean colour.
#   bash tools/pretrain.sh
# With arguments it is tools/pretrain_dino.sh. Everything goes to RUN (default runs/pretrain); the cohort is that of the quickstart and
# lies in COHORT (default runs/quickstart/cohort). Started again, it goes on. ENV=active uses the active environment.
set -euo pipefail

main() {
  : "${RUN:=runs/pretrain}"
  : "${COHORT:=runs/quickstart/cohort}"
  : "${TILES:=runs/quickstart/tiles}"
  : "${ENV:=venv}"
  # settings for a smaller trial: RENDER="cv_slides=20 pretrain_slides=8" PRETRAIN="epochs=1" MIL="folds=2"
  : "${RENDER:=}"
  : "${PRETRAIN:=}"
  : "${MIL:=}"
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
  fi
  if [[ $# -gt 0 ]]; then
    exec bash "$root/tools/pretrain_dino.sh" "$@"
  fi
  started=$SECONDS
  ENV="$ENV" bash "$root/tools/setup.sh"
  # shellcheck source=tools/lib.sh
  source "$root/tools/lib.sh"
  on_cohort=(slides="$COHORT/slides" labels="$COHORT/labels.csv")
  # shellcheck disable=SC2086
  run_python patch_encoder.demo.render_cohort --config "$root/configs/quickstart/cohort.yaml" output="$COHORT" $RENDER
  run_python patch_encoder.tile_slides --config "$root/configs/quickstart/tiles.yaml" "${on_cohort[@]}" output="$TILES"
  # shellcheck disable=SC2086
  run_python patch_encoder.pretrain_dino --config "$root/configs/intelligens/demo.yaml" slides="$COHORT/slides" coords="$TILES" \
    slides_list="$COHORT/labels.csv" output="$RUN/run" $PRETRAIN
  extract=(--config "$root/configs/quickstart/teacher.yaml" "${on_cohort[@]}" coords="$TILES")
  run_python patch_encoder.extract_features "${extract[@]}" encoder=dino weights="$RUN/run" output="$RUN/trained"
  run_python patch_encoder.extract_features "${extract[@]}" encoder=dino weights="$RUN/run/backbone_start.pt" output="$RUN/start"
  run_python patch_encoder.extract_features "${extract[@]}" encoder=mean_colour output="$RUN/colour"
  # shellcheck disable=SC2086
  run_python mil.benchmark --config "$root/configs/quickstart/mil.yaml" labels="$COHORT/labels.csv" subset=cv \
    features="[$RUN/trained/dino,$RUN/start/dino,$RUN/colour/mean_colour]" names="[trained,random_start,mean_colour]" output="$RUN/mil" $MIL
  run_python mil.report benchmark="$RUN/mil" slides="$COHORT/slides" labels="$COHORT/labels.csv" output="$RUN"
  run_python patch_encoder.pretrain_report run="$RUN/run" labels="$COHORT/labels.csv" output="$RUN/run/report"
  echo "pretrain: $((SECONDS - started)) s; table: $RUN/report.html, training: $RUN/run/report/pretraining.html, network: $RUN/run/backbone.pt"
}

main "$@"
exit
