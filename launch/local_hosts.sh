#!/usr/bin/env bash
# Runs a command in N processes of this machine that are one run together, as
# N hosts would be:
#
#     launch/local_hosts.sh 4 -- \
#       python -m bond_jax.train --config=... --workdir=... --config.mesh.data=-1
#     launch/local_hosts.sh 2 --devices 4 -- python -m bond_jax.sft ...
#
# It is for trying things out: `--devices K` gives each process K virtual CPU
# devices (1 without it). Processes find each other over loopback; every line
# of theirs comes with the number of the process in front. When one has failed,
# the others have 30 seconds (GRACE) to end by themselves, as bond_jax's do,
# and are ended then. The status is the first that is not 0.
set -euo pipefail

usage() {
  echo "error: $1; usage: $0 N [--devices K] -- COMMAND ..." >&2
  exit 2
}

count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || usage "'$count' is no number of processes"
shift
devices=1
if [ "${1:-}" = --devices ]; then
  devices=${2:-}
  [[ $devices =~ ^[1-9][0-9]*$ ]] || usage "'$devices' is no number of devices"
  shift 2
fi
[ "${1:-}" = -- ] || usage "'--' expected before the command, got '${1:-}'"
shift
[ $# -gt 0 ] || usage "no command"

# A port that nobody listens on now; below those that clients get by chance.
port=
for _ in $(seq 100); do
  try=$((10000 + RANDOM % 20000))
  if ! (exec 3<> "/dev/tcp/127.0.0.1/$try") 2> /dev/null; then
    port=$try
    break
  fi
done
[ -n "$port" ] || usage "no free port was found"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=$devices
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
export PYTHONUNBUFFERED=1

pids=()
end() {  # SIGNAL: to those that still run
  for pid in "${pids[@]}"; do
    kill -"$1" "$pid" 2> /dev/null || true
  done
}
# Processes in the background of a script take no notice of SIGINT.
trap 'end TERM' INT TERM
trap 'end KILL' EXIT

for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) < /dev/null &
  pids+=($!)
done

status=0
deadline=
running=("${pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  sleep 0.2 || true
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if [ "$code" -ne 0 ] && [ -z "$deadline" ]; then
      status=$code
      deadline=$((SECONDS + ${GRACE:-30}))
    fi
  done
  running=("${left[@]}")
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    end TERM
    sleep 2
    end KILL
    deadline=$((SECONDS + 3600))
  fi
done
exit "$status"
