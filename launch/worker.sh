#!/usr/bin/env bash
# What launch/tpu.sh does on each worker of a TPU, in the folder above this one:
#
#     launch/worker.sh setup [BUCKET]   # mounts it on runs/, makes .venv-tpu
#     launch/worker.sh start COMMAND..  # launch/tpu_vm.sh COMMAND.., detached;
#                                       # after "--" may follow another
#     launch/worker.sh status           # new | none | running | finished N | lost,
#                                       # or preempted: saved on a SIGTERM that
#                                       # did not come from stop
#     launch/worker.sh log FROM         # lines from FROM on, numbered, to its end
#     launch/worker.sh stop
#
# A run is a process group of its own. .run/ holds its log, its command, its id
# (the number of the group and when it was started) and, at the end, its status.
set -euo pipefail
cd "$(dirname "$0")/.."

GCSFUSE=3.1.0
# bond_jax/runs/stopping.py ends a run by itself in 300.
STOP_SECONDS=${STOP_SECONDS:-330}

fail() {
  echo "error: $*" >&2
  exit 2
}

# When a process was started, in clock ticks, by which a number used again is
# told apart; nothing if it has ended, buried or not.
started() {
  local stat
  stat=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return 0
  [[ $stat == Z* ]] || cut -d' ' -f20 <<<"$stat"
}

alive() {
  local pid when
  read -r pid when 2>/dev/null <.run/id || return 1
  [ "$(started "$pid")" = "$when" ]
}

status() {
  local on=''
  ! alive || on=1 # asked first: a run writes its status before it ends
  if [ -e .run/status ] && [ "$(cat .run/status)" = 143 ] \
    && [ ! -e .run/stopped ]; then
    echo preempted
  elif [ -e .run/status ]; then
    echo "finished $(cat .run/status)"
  elif [ -n "$on" ]; then
    echo running
  elif [ -e .run/id ]; then
    echo lost
  elif [ -e .venv-tpu/.done ]; then
    echo none
  else
    echo new
  fi
}

# Writes a file whole or not at all.
put() {
  cat >"$1.tmp" && mv "$1.tmp" "$1"
}

install_gcsfuse() {
  local deb=gcsfuse_${GCSFUSE}_amd64.deb
  echo "installing gcsfuse $GCSFUSE"
  curl --silent --show-error --fail --location --output "/tmp/$deb" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/$deb"
  sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet "/tmp/$deb" \
    >/dev/null
}

# Mounts the bucket on runs/. Metadata is not cached, because the workers write
# side by side and must see what the others wrote.
mount_bucket() {
  local bucket=$1 mounted
  mkdir -p runs
  mounted=$(findmnt --noheadings --output SOURCE --mountpoint "$PWD/runs" \
    || true)
  [ "$mounted" != "$bucket" ] || return 0
  [ -z "$mounted" ] || fail "runs/ is a mount of $mounted already; unmount it" \
    "there, or give --bucket=$mounted."
  [ -z "$(ls -A runs)" ] || fail "runs/ on the VM's disk is not empty, so" \
    "$bucket cannot be mounted on it; fetch or move what it holds."
  command -v gcsfuse >/dev/null || install_gcsfuse
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" "$PWD/runs" \
    >.run/gcsfuse.log 2>&1 \
    || fail "gcsfuse could not mount $bucket: $(tail -n 1 .run/gcsfuse.log)"
}

start() {
  local now
  exec 9>.run/lock
  flock --nonblock 9 || fail "another call starts or stops a run right now."
  now=$(status)
  echo "${*@Q}" >.run/asked
  if [ "$now" = running ]; then
    cmp --silent .run/asked .run/command \
      || fail "another run is on: $(cat .run/command); stop it first."
    echo "running already"
    return
  fi
  mv .run/asked .run/command
  rm -f .run/status .run/id .run/stopped
  [ ! -e .run/log ] || mv .run/log .run/log.before
  # setsid: no hang-up reaches it when the connection ends.
  setsid launch/worker.sh hold "$@" </dev/null >.run/log 2>&1 9>&- &
  while [ ! -e .run/id ] && kill -0 $! 2>/dev/null; do sleep 0.05; done
  [ -e .run/id ] || fail "the run did not come up: $(tail -n 1 .run/log)"
  echo started
}

# The run itself: the commands between "--", one after another until one fails.
# It leads its group, and outlives the signal that ends the rest, to write the
# status down; bash runs a trap when the command before it is over.
hold() {
  local word status=0 ended='' command=()
  trap 'ended=143' TERM INT HUP # before the id is there: by it the signal comes
  echo "$$ $(started $$)" | put .run/id || [ -e .run/id ]
  for word in "$@" --; do
    if [ "$word" != -- ]; then
      command+=("$word")
      continue
    fi
    [ -n "$ended" ] || launch/tpu_vm.sh "${command[@]}" || status=$?
    # A program that caught the signal and went on to its end is not followed.
    [ "$status" -ne 0 ] || status=${ended:-0}
    [ "$status" -eq 0 ] || break
    command=()
  done
  trap '' TERM INT HUP # nor is the status lost to a signal at the end
  echo "$status" | put .run/status
}

stop() {
  local pid
  exec 9>.run/lock
  flock --nonblock 9 || fail "another call starts or stops a run right now."
  if [ "$(status)" != running ]; then
    echo "not running"
    return
  fi
  read -r pid _ <.run/id
  touch .run/stopped
  kill -TERM -- "-$pid" 2>/dev/null || true # it may have ended just now
  for ((i = 0; i < STOP_SECONDS * 10; i++)); do
    [ "$(status)" = running ] || break
    sleep 0.1
  done
  if [ "$(status)" = running ]; then
    echo 137 | put .run/status
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
  echo stopped
}

log() {
  local number=$1 pid follow=()
  [ -e .run/log ] || fail "nothing has run here yet."
  if [ "$(status)" = running ]; then
    read -r pid _ <.run/id
    follow=(--follow --pid="$pid")
  fi
  tail --lines="+$number" "${follow[@]}" .run/log \
    | while IFS= read -r line || [ -n "$line" ]; do
    printf '%d %s\n' "$number" "$line"
    number=$((number + 1))
  done
  echo "end $(status)"
}

mkdir -p .run
verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  setup)
    [ "$(status)" != running ] || fail "a run is on here; stop it first."
    [ -z "${1:-}" ] || mount_bucket "$1"
    launch/tpu_vm.sh setup
    ;;
  start | status | log | stop | hold) "$verb" "$@" ;;
  *) fail "'$verb' is no verb; give setup, start, status, log or stop." ;;
esac
