#!/usr/bin/env bash
# Train a network that grades patches (AT+): a teacher at full resolution, and with TEACHER_CHECKPOINT a student that sees ratio^2 times fewer pixels.
#   SOURCE=SICAPv2 OUTPUT=runs/at_plus/teacher GPUS=4 bash tools/train_resolution_kd.sh --config configs/at_plus/sicapv2.yaml
#   ... TEACHER_CHECKPOINT=runs/at_plus/teacher/checkpoint_best.pt RATIO=4 OUTPUT=runs/at_plus/student bash tools/train_resolution_kd.sh --config configs/at_plus/sicapv2.yaml terms.kd=1
# All keys: bash tools/train_resolution_kd.sh --help
#   bash tools/train_resolution_kd.sh
# Without arguments it runs everything on rendered tissue in minutes on 2 CPU cores: patches and biopsies, a teacher, students that learn from the labels alone,
# from the teacher, and from what it says of patches without labels, their comparison, and the grades of a biopsy at two speeds. It goes to RUN (default runs/at_plus), and started again it goes on.
# SEEDS="0 1 2" draws training patches, teacher and students anew for each. ENV=active uses the active environment.
set -euo pipefail

demo() {
  : "${RUN:=runs/at_plus}"
  : "${SEEDS:=0}"
  # settings for a smaller trial: RENDER="patch_slides=8 biopsies=1" TRAIN="epochs=1"
  : "${RENDER:=}"
  : "${TRAIN:=}"
  local started=$SECONDS seed first="${SEEDS%% *}"
  bash "$ROOT/tools/setup.sh"
  for seed in $SEEDS; do
    local own="$RUN/seed$seed"
    # shellcheck disable=SC2086
    run_python patch_encoder.demo.render_grades output="$own/grades" seed="$seed" ungraded_slides=36 $RENDER
    train() {
      # shellcheck disable=SC2086
      run_python detection_kd.train_resolution_kd --config "$ROOT/configs/at_plus/demo.yaml" data.source="$own/grades/patches.csv" seed="$seed" "$@" $TRAIN
    }
    local student=(ratio=4 network.removed_strides=1) taught=(teacher_checkpoint="$own/teacher/checkpoint_best.pt")
    train output="$own/teacher"
    train output="$own/labels" "${student[@]}"
    train output="$own/kd" "${student[@]}" "${taught[@]}" terms.kd=1 terms.temperature=2
    train output="$own/kd_at_plus" "${student[@]}" "${taught[@]}" terms.kd=1 terms.temperature=2 terms.at_plus=1
    train output="$own/kd_ungraded" "${student[@]}" "${taught[@]}" terms.kd=1 terms.temperature=2 data.ungraded="$own/grades/ungraded.csv"
  done
  run_python detection_kd.evaluate_resolution runs="$RUN" output="$RUN/comparison"
  run_python detection_kd.grade_slide slides="$RUN/seed$first/grades/slides" grader="$RUN/seed$first/kd_ungraded/checkpoint_best.pt" \
    teacher_checkpoint="$RUN/seed$first/teacher/checkpoint_best.pt" output="$RUN/graded"
  echo "at_plus: $((SECONDS - started)) s; $RUN/comparison/resolution.html, $RUN/graded/grades.html"
}

# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -eq 0 && -z "${SOURCE:-}" ]]; then
  demo
  exit
fi
: "${OUTPUT:=runs/at_plus/teacher}"
collect_keys data.source data.format data.fold teacher_checkpoint ratio output
run_module detection_kd.train_resolution_kd "${keys[@]}" "$@"
