#!/usr/bin/env bash
# Make the Python environment: .venv in the repository, with uv where it can be had, else venv and pip.
#
#   bash tools/setup.sh                 everything, with the tests' and the pages' packages, into .venv
#   REQUIREMENTS=det bash tools/setup.sh    what one use needs: extract, det or mil, as in requirements-<use>.txt
#   ENV=active bash tools/setup.sh      use the environment that is active (conda, venv) as it is; only check it
#   PYTHON_BASE=python3.12 bash ...     the interpreter to build from (>= 3.10)
#   ARCHITECTURES=80,90 bash ...        CUDA architectures of the compiled ops; default: this machine's GPUs
#
# Then it builds the compiled ops. Running it again does nothing unless requirements or sources have changed.
set -euo pipefail
: "${ENV:=venv}"
: "${REQUIREMENTS:=all}"
: "${PYTHON_BASE:=python3}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,10p' "${BASH_SOURCE[0]}" | cut -c3-
  exit 0
fi

# build_ops PYTHON: the compiled ops, unless newer than their sources; for CUDA only where a GPU is, or when asked to
build_ops() {
  local packages=(detection_kd mil) package stamp stale=() options=()
  case "$REQUIREMENTS" in
    det) packages=(detection_kd) ;;
    mil) packages=(mil) ;;
    extract) return 0 ;;
  esac
  if [[ -n "${ARCHITECTURES:-}" ]]; then
    options=("architectures=[$ARCHITECTURES]")
  elif ! command -v nvidia-smi >/dev/null; then
    options=(cuda=no)
  fi
  for package in "${packages[@]}"; do
    stamp="$root/$package/ops/build/lib${package}_cpu.stamp"
    if [[ ! -f "$stamp" || -n "$(find "$root/$package/ops/csrc" "$root/wsi_common/csrc" "$root/wsi_common/ops/native.py" -newer "$stamp" -print -quit)" ]]; then
      stale+=("$package/ops")
    fi
  done
  if ((${#stale[@]})); then
    PYTHON="$1" bash "$root/tools/build_ops.sh" "ops=[$(IFS=,; echo "${stale[*]}")]" "${options[@]}" ||
      echo "warning: the attention ops are not built; their plain PyTorch form will run, many times slower" >&2
  fi
}

case "$REQUIREMENTS" in
  all) files=("$root/requirements-test.txt" "$root/requirements-docs.txt") ;;
  extract | det | mil) files=("$root/requirements-$REQUIREMENTS.txt") ;;
  *) echo "error: REQUIREMENTS=$REQUIREMENTS: expected all, extract, det or mil" >&2; exit 2 ;;
esac
if [[ "$ENV" == "active" ]]; then
  "$PYTHON_BASE" -c 'import torch, h5py, omegaconf, openslide' ||
    { echo "error: ENV=active: packages are missing in $(command -v "$PYTHON_BASE"); install ${files[*]##*/} there" >&2; exit 2; }
  build_ops "$(command -v "$PYTHON_BASE")"
  exit 0
fi
"$PYTHON_BASE" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "error: expected Python >= 3.10, found $("$PYTHON_BASE" --version 2>&1); set PYTHON_BASE=python3.x" >&2; exit 2; }

stamp="$root/.venv/.requirements"
# what tests compare with, without its dependencies: grad-cam asks for opencv-python, which overwrites opencv-python-headless
alone=("grad-cam>=1.5.5,<2" "ttach>=0.0.3,<1")
[[ "$REQUIREMENTS" == "all" ]] || alone=()
wanted="$({ cat "$root"/requirements-*.txt; echo "$REQUIREMENTS ${alone[*]-}"; } | cksum)"
python="$root/.venv/bin/python"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
  build_ops "$python"
  exit 0
fi
echo "setup: making $root/.venv (a few GB; minutes on a slow line)"
"$PYTHON_BASE" -m venv "$root/.venv" 2>/dev/null || uv venv --python "$PYTHON_BASE" "$root/.venv" ||
  { echo "error: cannot make a virtual environment; install python3-venv or uv" >&2; exit 2; }
arguments=()
for file in "${files[@]}"; do arguments+=(-r "$file"); done
if command -v uv >/dev/null; then
  install=(uv pip install --quiet --compile-bytecode --python "$python")
elif "$python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
  install=("$python" -m uv pip install --quiet --compile-bytecode --python "$python")
else
  install=("$python" -m pip install --disable-pip-version-check)
fi
"${install[@]}" "${arguments[@]}"
if ((${#alone[@]})); then "${install[@]}" --no-deps "${alone[@]}"; fi
echo "$wanted" >"$stamp"
build_ops "$python"
echo "setup: done"
