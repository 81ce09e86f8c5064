#!/usr/bin/env bash
# Train a mitosis localiser that learns only which tiles hold a mitosis (UTS): the teacher, and with KEPT of filter_samples the student.
#   ANNOTATIONS=MIDOG.json IMAGES=images CASES=cases.csv OUTPUT=runs/uts/teacher GPUS=4 bash tools/train_mitosis.sh --config configs/uts/midog21.yaml
#   ... KEPT=runs/uts/filter/kept.csv OUTPUT=runs/uts/student bash tools/train_mitosis.sh --config configs/uts/midog21.yaml
# All keys: bash tools/train_mitosis.sh --help
#   bash tools/train_mitosis.sh
# Without arguments it runs everything on rendered fields in minutes on 2 CPU cores: the fields, of whose positive labels 30 % are wrong, a
# teacher, the filter, a student, the mitoses that both find in the test fields with a page, and tables of them. It goes to RUN
# (default runs/uts), and started again it goes on. ENV=active uses the active environment.
set -euo pipefail

demo() {
  : "${RUN:=runs/uts}"
  : "${FIELDS:=$RUN/fields}"
  # settings for a smaller trial: RENDER="cohort_cases=15 field_side=400" TRAIN="epochs=1"
  : "${RENDER:=}"
  : "${TRAIN:=}"
  local started=$SECONDS name
  bash "$ROOT/tools/setup.sh"
  # shellcheck disable=SC2086
  run_python patch_encoder.demo.render_fields output="$FIELDS" wrong_share=0.3 $RENDER
  local fields=(data.images="$FIELDS/images" data.cases="$FIELDS/cases.csv")
  local noisy=(data.annotations="$FIELDS/MIDOG_noisy.json" "${fields[@]}")
  # shellcheck disable=SC2086
  run_python detection_kd.train_mitosis --config "$ROOT/configs/uts/demo.yaml" "${noisy[@]}" output="$RUN/teacher" $TRAIN
  run_python detection_kd.filter_samples "${noisy[@]}" teachers="$RUN/teacher/checkpoint_best.pt" truth="$FIELDS/MIDOG.json" \
    output="$RUN/filter"
  # shellcheck disable=SC2086
  run_python detection_kd.train_mitosis --config "$ROOT/configs/uts/demo.yaml" "${noisy[@]}" kept="$RUN/filter/kept.csv" \
    output="$RUN/student" $TRAIN
  awk -F, '$5 == "test" { print $1 }' "$FIELDS/cases.csv" >"$RUN/test_fields.txt"
  for name in teacher student; do
    run_python detection_kd.detect_mitosis slides="$FIELDS/images" slides_list="$RUN/test_fields.txt" cases="$FIELDS/cases.csv" \
      localiser="$RUN/$name/checkpoint_best.pt" output="$RUN/$name-mitoses"
    run_python detection_kd.evaluate_mitosis data.annotations="$FIELDS/MIDOG.json" "${fields[@]}" detections="$RUN/$name-mitoses" \
      output="$RUN/$name-test"
  done
  echo "uts: $((SECONDS - started)) s; page: $RUN/student-mitoses/mitoses.html, tables: $RUN/{teacher,student}-test, filter: $RUN/filter/kept.csv"
}

# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -eq 0 && -z "${ANNOTATIONS:-}" ]]; then
  demo
  exit
fi
: "${OUTPUT:=runs/uts/teacher}"
collect_keys data.annotations data.format data.images data.cases data.splits kept output
run_module detection_kd.train_mitosis "${keys[@]}" "$@"
