#!/usr/bin/env bash
# Put regions on a Redis server for store=redis, compare them, list what is there, drop it.
#   REGIONS=runs/regions/uni2_h bash tools/load_redis.sh [action=fill|verify|list|drop] [key=value ...]
# REDIS_URL or redis_url= names the server; tools/redis_server.sh starts one. All keys: bash tools/load_redis.sh --help
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
collect_keys regions features
run_python patch_encoder.load_redis ${keys[@]+"${keys[@]}"} "$@"
