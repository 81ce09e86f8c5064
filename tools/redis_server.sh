#!/usr/bin/env bash
# Start a Redis server for regions on this machine, without snapshots and without eviction, or stop it.
#   bash tools/redis_server.sh             start it in the background; prints its address for REDIS_URL
#   bash tools/redis_server.sh stop        stop it; what it holds is gone, load_redis fills it again
#   PORT=6390 bash tools/redis_server.sh   answer on 127.0.0.1:PORT as well; default: a socket file only
#   FOLDER=/tmp/regions ...                where its socket, log and process id lie; default: a folder of /tmp by user
#   MAXMEMORY=20gb ...                     refuse what goes beyond; default: no limit
# Needs redis-server: apt-get install redis-server
set -euo pipefail
: "${PORT:=0}"
: "${FOLDER:=/tmp/redis_regions_$(id -u)}"
: "${MAXMEMORY:=0}"
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '2,8p' "${BASH_SOURCE[0]}" | cut -c3-
  exit 0
fi
socket="$FOLDER/redis.sock"

# answers: whether a server answers on the socket
answers() {
  [[ -S "$socket" && "$(redis-cli -s "$socket" ping 2>/dev/null)" == PONG ]]
}

case "${1:-start}" in
  start) ;;
  stop)
    if answers; then
      redis-cli -s "$socket" shutdown nosave || true
      echo "redis_server: stopped" >&2
    else
      echo "redis_server: none is running at $socket" >&2
    fi
    exit 0
    ;;
  *) echo "error: $1: expected start or stop" >&2; exit 2 ;;
esac
command -v redis-server >/dev/null ||
  { echo "error: expected redis-server, found none; apt-get install redis-server, or set store=hdf5" >&2; exit 2; }
((${#socket} < 108)) || { echo "error: FOLDER=$FOLDER: expected a path of under 90 characters" >&2; exit 2; }
if answers; then
  echo "redis_server: it is running already; PORT and MAXMEMORY stay as they were" >&2
else
  mkdir -p "$FOLDER" && chmod 700 "$FOLDER"
  redis-server --save "" --appendonly no --maxmemory-policy noeviction --maxmemory "$MAXMEMORY" \
    --port "$PORT" --bind 127.0.0.1 --unixsocket "$socket" --unixsocketperm 700 --dir "$FOLDER" \
    --daemonize yes --pidfile "$FOLDER/redis.pid" --logfile "$FOLDER/redis.log" >/dev/null
  for ((attempt = 0; attempt < 100; attempt++)); do
    answers && break
    sleep 0.1
  done
  answers || { echo "error: the server does not answer; see $FOLDER/redis.log" >&2; exit 2; }
fi
echo "unix://$socket"
