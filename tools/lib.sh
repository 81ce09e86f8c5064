# shellcheck shell=bash
# Sourced by the stage scripts: where the repository is, which Python, how many processes.
#
#   PYTHON   interpreter; default: <repository>/.venv/bin/python when it is there, else python3 (always so with ENV=active)
#   GPUS     processes on this machine; default: the number of GPUs seen; 0 or 1: plain Python (extraction: default 1)
#   NNODES   machines; default 1. With more: RDZV_ENDPOINT=host:port of the first one, the same command on each

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ "${ENV:-}" != active && -x "$ROOT/.venv/bin/python" ]]; then
  : "${PYTHON:=$ROOT/.venv/bin/python}"
fi
: "${PYTHON:=python3}"
# PYTHONSAFEPATH: a folder named like one of ours in the caller's working directory is not imported
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
# threads that wait sleep instead of spinning: on shared cores spinning made a training step several times slower
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
: "${NNODES:=1}"
: "${RDZV_ENDPOINT:=localhost:29500}"

count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | wc -l
  else
    echo 0
  fi
}

# collect_keys <name> ...: fill the array `keys` with name=value for every variable NAME (in capitals) that is not empty;
# a name that ends in [] is a list, whose value is separated by commas; the variable of a key in a block, as data.images, is IMAGES
collect_keys() {
  keys=()
  local name variable
  for name in "$@"; do
    variable="${name%\[\]}"
    variable="${variable##*.}"
    variable="${variable^^}"
    if [[ -n "${!variable:-}" && "$name" == *"[]" ]]; then
      keys+=("${name%\[\]}=[${!variable}]")
    elif [[ -n "${!variable:-}" ]]; then
      keys+=("$name=${!variable}")
    fi
  done
}

# choose_config <file> <arguments>: fill the array `config` with the option for the file CONFIG, or else for this one; empty where
# CONFIG is and the arguments have a file of their own
choose_config() {
  config=()
  local argument given=""
  for argument in "${@:2}"; do
    [[ "$argument" == --config || "$argument" == --config=* ]] && given=yes
  done
  if [[ -z "$given" || -n "${CONFIG:-}" ]]; then
    config+=(--config "${CONFIG:-$1}")
  fi
}

# default_key <name> <value> <arguments>: put name=value before the array `keys`, unless the file that --config names has the key
default_key() {
  local argument previous="" file=""
  for argument in ${config[@]+"${config[@]}"} "${@:3}"; do
    [[ "$previous" == --config ]] && file="$argument"
    [[ "$argument" == --config=* ]] && file="${argument#--config=}"
    previous="$argument"
  done
  if [[ -z "$file" ]] || ! grep -qs "^$1:" "$file"; then
    keys=("$1=$2" ${keys[@]+"${keys[@]}"})
  fi
}

# run_python <module> <arguments>: one process, whatever the number of GPUs
run_python() {
  local module=$1
  shift
  "$PYTHON" -m "$module" "$@"
}

# run_module <module> <arguments>: torchrun with more than one process, plain Python else and for --help
run_module() {
  : "${GPUS:=$(count_gpus)}"
  local argument
  for argument in "${@:2}"; do
    [[ "$argument" == --help || "$argument" == -h ]] && GPUS=1 NNODES=1
  done
  if ((GPUS <= 1 && NNODES <= 1)); then
    run_python "$@"
    return
  fi
  local rendezvous=(--standalone)
  if ((NNODES > 1)); then
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT")
  fi
  run_python torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$((GPUS > 0 ? GPUS : 1))" -m "$@"
}

# share_gpus <arguments>: fill the array `keys` with workers= and devices= of one process that runs WORKERS jobs at a time on each of
# the GPUS GPUs of this machine; not with Ray or for --help, and no devices where the arguments name them
share_gpus() {
  : "${GPUS:=$(count_gpus)}"
  if ((NNODES > 1)); then
    echo "error: NNODES=$NNODES: expected one machine; start engine=ray on a Ray cluster of several" >&2
    exit 2
  fi
  local argument seen index devices=""
  seen=$(count_gpus)
  for argument in "$@"; do
    [[ "$argument" == --help || "$argument" == -h || "$argument" == engine=ray ]] && GPUS=1
    [[ "$argument" == device=* || "$argument" == devices=* ]] && seen=0
  done
  for ((index = 0; index < GPUS && index < seen && GPUS > 1; index++)); do
    devices+="${devices:+,}cuda:$index"
  done
  keys=("workers=$((WORKERS * (GPUS > 1 ? GPUS : 1)))" ${devices:+"devices=[$devices]"})
}

# run_shards <module> <arguments>: GPUS processes that share a cohort, each on a GPU of its own where there are GPUs; the status is
# the worst of theirs
run_shards() {
  : "${GPUS:=1}"
  local argument
  for argument in "$@"; do
    # a shard of the user's choice, or Ray, is one process here
    [[ "$argument" == --help || "$argument" == -h || "$argument" == shard=* || "$argument" == engine=ray ]] && GPUS=1
  done
  if ((GPUS <= 1)); then
    run_python "$@"
    return
  fi
  local module=$1 seen pids=() status=0 index
  shift
  seen=$(count_gpus)
  for ((index = 0; index < GPUS; index++)); do
    local device=()
    ((seen > 0)) && device=("device=cuda:$((index % seen))")
    run_python "$module" ${device[@]+"${device[@]}"} "$@" "shard=$((index + 1))/$GPUS" &
    pids+=($!)
  done
  # shellcheck disable=SC2064
  trap "kill ${pids[*]} 2>/dev/null || true" EXIT
  for index in "${pids[@]}"; do
    local one=0
    wait "$index" || one=$?
    ((one > status)) && status=$one
  done
  trap - EXIT
  return "$status"
}
