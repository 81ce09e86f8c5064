#!/usr/bin/env bash
# Pre-train a region encoder on regions of tile features, without labels (SLPD).
#   REGIONS=runs/regions/uni2_h LABELS=labels.csv OUTPUT=runs/slpd GPUS=4 bash tools/pretrain_slpd.sh --config configs/slpd/nsclc.yaml [key=value ...]
# STORE=redis reads them from a server that tools/load_redis.sh has filled, at REDIS_URL. Several machines: NNODES and RDZV_ENDPOINT, see
# tools/lib.sh. All keys: bash tools/pretrain_slpd.sh --help
#   bash tools/pretrain_slpd.sh
# Without arguments it runs everything on the embedded cohort in minutes on 2 CPU cores: slides with known zones, tile features, regions,
# a Redis server of its own where redis-server is installed (else files), the training, a page on slides alike, and the table of the
# region study. It goes to RUN (default runs/slpd), and started again it goes on. ENV=active uses the active environment.
set -euo pipefail

demo() {
  : "${RUN:=runs/slpd}"
  : "${COHORT:=$RUN/cohort}"
  # settings for a smaller trial: RENDER="cv_slides=12" PRETRAIN="epochs=4" STUDY="mil=['folds=2']"
  : "${RENDER:=}"
  : "${PRETRAIN:=}"
  : "${PAGE:=}"
  : "${STUDY:=}"
  local started=$SECONDS store=(store=hdf5) regions="$RUN/regions/stain_texture"
  bash "$ROOT/tools/setup.sh"
  # shellcheck disable=SC2086
  run_python patch_encoder.demo.render_cohort --config "$ROOT/configs/slpd/cohort.yaml" output="$COHORT" $RENDER
  local on_cohort=(slides="$COHORT/slides" labels="$COHORT/labels.csv")
  run_python patch_encoder.tile_slides --config "$ROOT/configs/quickstart/tiles.yaml" "${on_cohort[@]}" tile_size=64 output="$RUN/tiles"
  run_python patch_encoder.extract_features --config "$ROOT/configs/quickstart/teacher.yaml" encoder=stain_texture "${on_cohort[@]}" coords="$RUN/tiles" output="$RUN/features"
  run_python patch_encoder.build_regions features="$RUN/features/stain_texture" output="$RUN/regions" region_tiles=8 min_regions=8
  if command -v redis-server >/dev/null; then
    # a socket's path is short
    FOLDER=$(mktemp -d /tmp/slpd_redis_XXXXXX)
    export FOLDER
    trap 'bash "$ROOT/tools/redis_server.sh" stop; rm -rf "$FOLDER"' EXIT
    REDIS_URL=$(bash "$ROOT/tools/redis_server.sh")
    export REDIS_URL
    run_python patch_encoder.load_redis regions="$regions"
    store=(store=redis)
  fi
  # shellcheck disable=SC2086
  run_python patch_encoder.pretrain_slpd --config "$ROOT/configs/slpd/demo.yaml" regions="$regions" labels="$COHORT/labels.csv" \
    "${store[@]}" output="$RUN/run" $PRETRAIN
  run_python patch_encoder.extract_regions weights="$RUN/run" regions="$regions" "${store[@]}" output="$RUN/region_features"
  # shellcheck disable=SC2086
  run_python patch_encoder.region_report features="$RUN/region_features/run" run="$RUN/run" "${on_cohort[@]}" output="$RUN/page" $PAGE
  # shellcheck disable=SC2086
  run_python studies.region_study --config "$ROOT/configs/slpd/demo_study.yaml" cohort="$COHORT" features="$RUN/features" \
    mil_config="$ROOT/configs/quickstart/mil.yaml" pretrain="[--config=$ROOT/configs/slpd/demo.yaml]" output="$RUN/study" $STUDY
  echo "slpd: $((SECONDS - started)) s; table: $RUN/study/region_study.md, page: $RUN/page/regions.html, network: $RUN/run/backbone.pt"
}

# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -eq 0 ]]; then
  demo
  exit
fi
: "${OUTPUT:=runs/slpd}"
collect_keys regions labels store output
run_module patch_encoder.pretrain_slpd "${keys[@]}" "$@"
