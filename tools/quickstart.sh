#!/usr/bin/env bash
# TS2G-KD from slides to a table of slide-level results and a report page, on 2 CPU cores in minutes.
#
#   bash tools/quickstart.sh                 on a small cytology cohort that it renders itself (no download)
#   DATA=<folder> bash tools/quickstart.sh   on pictures of yours: <folder> holds labels.csv, slides/ and detection/{train,val}.json
#                                            + detection/images/; or bccd/ (blood smear fields: Annotations/, ImageSets/,
#                                            JPEGImages/), or labelled fields named NL_12_ (3).jpg, HSIL_1 (10).jpg, ...
#                                            in any tree; from fields, slides are composed
#
# TEACHER=imagenet_lite0 (default) or stain_texture is whom the student imitates; both are in the table.
# Everything goes to RUN (default runs/quickstart). Killed at any point and started again, it goes on; a second run over
# finished work does nothing. ENV=active uses the active environment, PYTHON names the interpreter.
set -euo pipefail

# bash reads a script while it runs; a function is read whole, so that an update in mid-run does no harm
main() {
  : "${DATA:=}"
  : "${ENV:=venv}"
  : "${RUN:=}"
  : "${TEACHER:=imagenet_lite0}"
  # sizes, for a smaller trial: COHORT="cv_slides=20 pretrain_slides=8" DETECTOR="epochs=1" D2VFM="epochs=2" MIL="folds=2" ...
  : "${FIELDS:=}"
  : "${COHORT:=}"
  : "${DETECTOR:=}"
  : "${RANK:=}"
  : "${D2VFM:=}"
  : "${COST:=}"
  : "${MIL:=}"
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
  fi
  if [[ $# -gt 0 ]]; then
    echo "error: quickstart.sh takes no arguments, found '$1'; see --help" >&2
    exit 2
  fi
  started=$SECONDS
  ENV="$ENV" bash "$root/tools/setup.sh"
  # shellcheck source=tools/lib.sh
  source "$root/tools/lib.sh"
  configs="$root/configs/quickstart"

  # stage NAME MODULE ARGUMENT ...: one stage, its time and memory noted once in stages.json
  stage() {
    local name="$1"
    shift
    echo "== $name"
    "$PYTHON" -m wsi_common.stage_timer "$RUN/stages.json" "$name" -- "$PYTHON" -m "$@"
  }

  # the user's own fields keep their categories; the rendered ones have one
  categories=(class_agnostic=false)
  # the cohort: rendered, composed from annotated fields, or the user's own
  split_cv=cv split_pretrain=pretrain protocol=cv controls=(mean_colour)
  if [[ -z "$DATA" ]]; then
    : "${RUN:=runs/quickstart}"
    cohort="$RUN/cohort" categories=()
    # shellcheck disable=SC2086
    stage "render cohort" patch_encoder.demo.render_cohort --config "$configs/cohort.yaml" output="$cohort" $COHORT
  elif [[ -f "$DATA/labels.csv" ]]; then
    : "${RUN:=runs/quickstart-$(basename "$DATA")}"
    cohort="$DATA"
    splits="$("$PYTHON" -c 'import csv, sys; print(*{row.get("split") for row in csv.DictReader(open(sys.argv[1]))})' "$DATA/labels.csv")"
    if [[ " $splits " == *" test "* ]]; then
      split_cv='' split_pretrain=train protocol=fixed
    elif [[ " $splits " != *" pretrain "* ]]; then
      split_cv='' split_pretrain=''
    fi
  elif [[ -d "$DATA/bccd" ]]; then
    : "${RUN:=runs/quickstart-bccd}"
    cohort="$RUN/cohort" split_cv='' split_pretrain=train protocol=fixed
    stage "convert boxes" detection_kd.convert_annotations layout=voc boxes="$DATA/bccd/Annotations" images="$DATA/bccd/JPEGImages" \
      output="$RUN/boxes" overwrite=true
    # shellcheck disable=SC2086
    stage "compose cohort" patch_encoder.demo.compose_cohort --config "$configs/compose.yaml" output="$cohort" \
      images="$DATA/bccd/JPEGImages" annotations="$RUN/boxes/annotations.json" lists="$DATA/bccd/ImageSets/Main" $COHORT
  elif [[ -d "$DATA" && -n "$(find -L "$DATA" -iname 'NL_*(*).*' -print -quit)" ]]; then
    : "${RUN:=runs/quickstart-cervical}"
    # light and focus of the source tell the classes apart: the table has to show by how much
    cohort="$RUN/cohort" categories=() split_cv=test split_pretrain=train controls=(mean_colour colour_statistics sharpness)
    # shellcheck disable=SC2086
    stage "label fields" patch_encoder.demo.label_fields --config "$configs/cervical_fields.yaml" fields="$DATA" output="$RUN/fields" $FIELDS
    # shellcheck disable=SC2086
    stage "compose cohort" patch_encoder.demo.compose_cohort --config "$configs/cervical_slides.yaml" output="$cohort" \
      images="$RUN/fields/images" annotations="$RUN/fields/annotations.json" lists="$RUN/fields/lists" $COHORT
  else
    echo "error: DATA=$DATA: expected labels.csv with slides/ and detection/, bccd/, or fields named NL_12_ (3).jpg, found none" >&2
    exit 2
  fi

  on_cohort=(slides="$cohort/slides" labels="$cohort/labels.csv")
  tiles="$RUN/tiles" features="$RUN/features" student="$RUN/d2vfm/checkpoint_best.pt"
  stage "tile slides" patch_encoder.tile_slides --config "$configs/tiles.yaml" "${on_cohort[@]}" output="$tiles"
  # the student's teacher first: the others are compared with it
  if [[ "$TEACHER" == stain_texture ]]; then other=imagenet_lite0; else other=stain_texture; fi
  encoders=("$TEACHER" "$other" "${controls[@]}")
  feature_sets="$features/$TEACHER,$features/student"
  for encoder in "${encoders[@]}"; do
    [[ "$encoder" == "$TEACHER" ]] || feature_sets+=",$features/$encoder"
    stage "$encoder features" patch_encoder.extract_features --config "$configs/teacher.yaml" encoder="$encoder" "${on_cohort[@]}" \
      coords="$tiles" output="$features"
  done
  # shellcheck disable=SC2086
  stage "train detector" detection_kd.train_detector --config "$configs/detector.yaml" output="$RUN/detector" \
    train="$cohort/detection/train.json" val="$cohort/detection/val.json" images="$cohort/detection/images" "${categories[@]}" $DETECTOR
  # shellcheck disable=SC2086
  stage "rank patches" mil.rank_patches --config "$configs/rank.yaml" "${on_cohort[@]}" features="$features/$TEACHER" \
    subset="$split_pretrain" output="$RUN/distillation" $RANK
  # shellcheck disable=SC2086
  stage "train d2vfm" detection_kd.train_d2vfm --config "$configs/d2vfm.yaml" teacher="$TEACHER" dataset="$RUN/distillation" \
    backbone="$RUN/detector/backbone.pt" output="$RUN/d2vfm" $D2VFM
  stage "student features" detection_kd.extract_student --config "$configs/student.yaml" "${on_cohort[@]}" coords="$tiles" \
    student="$student" output="$features"
  # shellcheck disable=SC2086
  stage "encoder cost" studies.measure_encoders encoders="[$(IFS=, && echo "${encoders[*]}")]" student="$student" "${on_cohort[@]}" \
    coords="$tiles" output="$RUN/encoder_cost.json" tiles_per_round=128 $COST
  # shellcheck disable=SC2086
  stage "mil benchmark" mil.benchmark --config "$configs/mil.yaml" labels="$cohort/labels.csv" protocol="$protocol" subset="$split_cv" \
    features="[$feature_sets]" cost="$RUN/encoder_cost.json" output="$RUN/mil" models='[mean,abmil]' $MIL
  "$PYTHON" -m mil.report benchmark="$RUN/mil" stage_times="$RUN/stages.json" slides="$cohort/slides" labels="$cohort/labels.csv" output="$RUN"
  echo "quickstart: $((SECONDS - started)) s; report: $RUN/report.html, figures: $RUN/summary.json"
}

main "$@"
exit
