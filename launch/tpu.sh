#!/usr/bin/env bash
# A TPU VM, a queued (spot) resource or a multislice, from your machine:
#
#     launch/tpu.sh keep --name=demo --zone=us-west4-a --type=v5litepod-16 \
#       --spot --queued --bucket=my-bucket \
#       -- movie_reviews --data_dir=data \
#       -- sft --config=configs/demo.py --workdir=runs/demo
#
# Verbs, each of which may be repeated; give all of them the same flags:
#
#     create   the TPU, and waits until it is there
#     setup    copies HEAD's code to ~/bond_jax on every worker, mounts the
#              bucket on its runs/, and makes its environment
#     run      starts the commands after "--" on every worker, detached, one
#              after another until one fails
#     logs     follows worker 0, or --worker=K of --slice=S, until the run ends
#     status   what each worker does; 0: the run is finished, 4: it is on, 7: it
#              was asked to end, has saved, and goes on with "resume" or "keep"
#     stop     ends the run on every worker
#     resume   whatever of create, setup and run is missing: replaces a TPU that
#              was preempted, and starts the command again if it does not run
#     keep     resumes, every --every=SECONDS, until the command is finished
#     fetch    copies --workdir=runs/.. here, and with --checkpoints those too
#     delete   the TPU; asks first, unless --yes
#
#     --name --zone [--project]      where it is and what it is called
#     --type [--version]             accelerator type, and another runtime
#     --spot --queued --num-slices   --queued waits in line for capacity,
#     --valid-until=6h               at most this long; slices imply --queued
#     --bucket                       holds runs/; without it runs/ is lost with
#                                    the TPU, and a resumed run starts anew
#     --dry-run                      prints every command and runs none
set -euo pipefail
cd "$(dirname "$0")/.."

shopt -s inherit_errexit

# shellcheck source=launch/tpu_flags.sh
source launch/tpu_flags.sh
# shellcheck source=launch/tpu_calls.sh
source launch/tpu_calls.sh

# Waits until the TPU is there, and makes it if it is not. With "replace", one
# that was preempted or has failed is deleted first.
create() { # [replace]
  local now before='' asked=''
  needs type "$type"
  while :; do
    now=$(state)
    [ -z "$dry_run" ] || now=absent
    [ "$now" = "$before" ] || say "$now"
    before=$now
    case $now in
      READY | ACTIVE) return ;;
      absent)
        create_tpu
        [ -z "$dry_run" ] || return 0
        asked=1
        ;;
      STOPPED | STOPPING | HIDDEN | HIDING)
        fail 1 "$name is $now: somebody stopped it; start it again with" \
          "\"gcloud compute tpus tpu-vm start $name --zone=$zone\"."
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED | UNKNOWN)
        [ -z "$asked" ] || fail 3 "$name was asked for and is $now;" \
          "\"gcloud compute tpus queued-resources describe $name" \
          "--zone=$zone\" may say why."
        [ "${1:-}" = replace ] \
          || fail 1 "$name is $now; \"resume\" replaces it, \"delete\" ends it."
        delete_tpu
        ;;
      *) sleep "$every" ;;
    esac
  done
}

# A folder is renamed at once only in a bucket of this kind, and a checkpoint is
# complete when its folder has been renamed.
check_bucket() {
  local answer
  answer=$(call gcloud storage buckets describe "gs://$bucket" --raw --quiet \
    --format='value(hierarchicalNamespace.enabled)') \
    || explain "bucket $bucket"
  [ -n "$dry_run" ] || [ "$answer" = True ] || fail 1 "$bucket has no" \
    "hierarchical namespace, without which a preemption may leave half a" \
    "checkpoint; make one with \"gcloud storage buckets create gs://NAME" \
    "--location=${zone%-*} --uniform-bucket-level-access" \
    "--enable-hierarchical-namespace\"."
}

copy() { # NODE K
  call gcloud compute tpus tpu-vm scp "$tmp/bond_jax.tgz" "$1:bond_jax.tgz" \
    --worker="$2" "${where[@]}" --scp-flag=-oConnectTimeout=20
}

# What the copy before held and this one does not, goes; .venv-tpu, data and
# runs stay.
unpack() { # NODE K
  on_worker "$1" "$2" "mkdir -p bond_jax && cd bond_jax && if [ -e .files ]; then xargs -d '\\n' rm -f -- <.files; fi && tar -xzf ../bond_jax.tgz && tar -tzf ../bond_jax.tgz | grep -v '/\$' >.files && launch/worker.sh setup${bucket:+ $bucket}"
}

setup() {
  [ -z "$bucket" ] || check_bucket
  find_workers
  find_statuses
  all_reached
  ! some running || fail 1 "a run is on; \"stop\" it before the code changes."
  [ -n "$dry_run" ] || [ -z "$(git status --porcelain 2>/dev/null)" ] \
    || say "what is not committed is not copied"
  call git archive --format=tar.gz --output="$tmp/bond_jax.tgz" HEAD \
    || fail 1 "git archive: $(last_line "$said")"
  say "copying the code and making the environment: minutes, the first time"
  each copy
  all_worked "copying the code"
  each unpack
  all_worked setup
  say "set up"
}

# The command line that worker.sh gets, quoted for the shell at the other end.
remote() { printf 'bond_jax/launch/worker.sh %s' "$(quoted "$@")"; }

start_one() { # NODE K
  on_worker "$1" "$2" "$(remote start "${command[@]}")" \
    | tee "$tmp/$1.$2.started"
}

stop_one() { on_worker "$1" "$2" "$(remote stop)"; }

stop_started() { # NODE K
  ! grep -q '^started' "$tmp/$1.$2.started" || stop_one "$1" "$2"
}

# Starts the command everywhere, or nowhere: one that waits for a worker that
# never comes would hold the others. Where it runs already, it is left alone.
start_all() {
  local rc=0
  each start_one
  (all_worked start) || rc=$?
  if [ "$rc" -ne 0 ]; then
    each stop_started
    exit "$rc"
  fi
  if [ -z "$dry_run" ] && ! grep -q '^started' "$tmp"/*.started; then
    say "runs already"
  else
    say "started on ${#workers[@]} worker(s); \"logs\" follows it"
  fi
}

run() {
  needs_command
  find_workers
  find_statuses
  all_reached
  ! some new || fail 1 "not every worker is set up; \"setup\" comes first."
  start_all
}

# 0: finished everywhere with status 0, 4: it runs, 5: it ended otherwise or was
# never started, 6: a worker cannot be reached, 7: it saved on SIGTERM and ended.
outcome() {
  if some unreachable; then
    echo 6
  elif some running; then
    echo 4
  elif [[ ${statuses[*]} =~ ^(finished 0 ?)+$ ]]; then
    echo 0
  elif [[ ${statuses[*]} =~ ^((finished 0|preempted) ?)+$ ]]; then
    echo 7
  else
    echo 5
  fi
}

status() {
  local i
  find_workers
  find_statuses
  for i in "${!statuses[@]}"; do
    echo "${workers[i]/ / worker }: ${statuses[i]}"
  done
  [ -n "$dry_run" ] || exit "$(outcome)"
}

stop() {
  find_workers
  each stop_one
  all_worked stop
  say "stopped"
}

same_command() {
  local node k last
  read -r node k <<<"${workers[0]}"
  last=$(on_worker "$node" "$k" 'cat bond_jax/.run/command') || return 1
  [ "$last" = "${command[*]@Q}" ]
}

resume() {
  needs_command
  create replace
  find_workers
  find_statuses
  all_reached
  if [ -z "$dry_run" ] && [ "$(outcome)" -eq 0 ] && same_command; then
    say "finished; \"fetch\" brings the results, \"delete\" ends the TPU"
    return
  fi
  # Where one worker has ended, the others wait for it in vain.
  ! some running || ! some 'finished|preempted|lost|new|none' \
    || each stop_one
  # lost: the VM was started anew, and the bucket is no longer mounted.
  if [ -n "$dry_run" ] || some 'new|lost'; then setup; fi
  start_all
}

# Waits for the end of the run; a TPU that went away is made again. A run that
# ended by itself with another status is not repeated. But three looks are taken
# at it, because a slice that is preempted takes the run of the others down
# before its state says so.
keep() {
  local step=resume tries=0 looks=0 pause rc
  needs_command
  [ -n "$bucket" ] || say "without --bucket, what is resumed starts anew"
  if [ -n "$dry_run" ]; then
    resume
    echo "# then every $every s, until it is finished:"
    status
    return
  fi
  while :; do
    rc=0 pause=$every
    if [ "$step" = resume ]; then
      launch/tpu.sh resume "${flags[@]}" -- "${command[@]}" || rc=$?
    else
      launch/tpu.sh status "${flags[@]}" >"$tmp/now" || rc=$?
      cmp --silent "$tmp/now" "$tmp/before" || cat "$tmp/now"
      mv "$tmp/now" "$tmp/before"
    fi
    case $step.$rc in
      status.0) return ;;
      status.4 | resume.0) step=status tries=0 looks=0 ;;
      status.1) step=resume pause=0 ;;
      status.7) step=resume ;; # the machine may be going down: after a pause
      status.[56] | resume.6)
        looks=$((looks + 1))
        [ "$looks" -lt 3 ] || fail 1 "the run does not go on, and the TPU is" \
          "there: see \"status\" and \"logs\"."
        ;;
      resume.1) # was it preempted on the way up?
        looks=$((looks + 1))
        [ "$looks" -lt 3 ] && [ "$(state)" != READY ] || exit 1
        ;;
      resume.3) # no TPU now: later, after twice as long each time
        tries=$((tries + 1))
        [ "$tries" -lt 8 ] || fail 3 "no TPU after $tries tries."
        pause=$((every << tries))
        say "try $tries of 8; the next in $pause s"
        ;;
      *) exit "$rc" ;;
    esac
    sleep "$pause"
  done
}

# Every line comes with its number: gcloud repeats the command by itself when a
# connection breaks, and what was printed already is dropped.
logs() {
  local node=$name next=1 before last='' silent=0 number line
  [ "$num_slices" -eq 1 ] || node=$name-$slice
  if [ -n "$dry_run" ]; then
    on_worker "$node" "$worker" "$(remote log "$next")"
    return
  fi
  while :; do
    before=$next
    while IFS= read -r line; do
      number=${line%% *}
      line=${line#* }
      if [ "$number" = end ]; then
        last=$line
      elif [ "$number" -ge "$next" ]; then
        printf '%s\n' "$line"
        next=$((number + 1))
      fi
    done < <(on_worker "$node" "$worker" "$(remote log "$next")")
    case $last in
      'finished 0') return ;;
      ?*) fail 1 "worker $worker of $node: $last" ;;
    esac
    ! grep -q '^error: ' "$said" \
      || fail 1 "$(grep -m 1 '^error: ' "$said" | sed 's/^error: //')"
    find_workers # says so if the TPU is gone
    if [ "$next" -gt "$before" ]; then silent=0; else silent=$((silent + 1)); fi
    [ "$silent" -lt 5 ] || unreachable "$node $worker" "$said"
    say "the connection broke; once more in $every s"
    sleep "$every"
  done
}

# Without a bucket everything is on the disk of the first worker.
fetch() {
  local node pack="tar -czf bond_jax_fetch.tgz -C bond_jax" only=()
  needs workdir "$workdir"
  if [ -z "$checkpoints" ]; then
    only=(--exclude='(.*/)?checkpoints/.*')
    pack+=" --exclude=checkpoints"
  fi
  if [ -n "$bucket" ]; then
    call mkdir -p "$workdir"
    call gcloud storage rsync "gs://$bucket/${workdir#runs/}" "$workdir" \
      --recursive --quiet "${only[@]}" >&2 || explain "fetch $workdir"
  else
    find_workers
    read -r node _ <<<"${workers[0]}"
    on_worker "$node" 0 "$pack $workdir" >&2 || explain "fetch $workdir"
    call gcloud compute tpus tpu-vm scp "$node:bond_jax_fetch.tgz" \
      "$tmp/fetch.tgz" --worker=0 "${where[@]}" || explain "fetch $workdir"
    call tar -xzf "$tmp/fetch.tgz" || fail 1 "tar: $(last_line "$said")"
  fi
  say "$workdir is here"
}

delete() {
  local now answer=''
  now=$(state)
  if [ "$now" = absent ]; then
    say "there is none"
    return
  fi
  if [ -z "$yes$dry_run" ]; then
    read -r -p "delete $name ($now, $zone)? Type its name: " answer || true
    [ "$answer" = "$name" ] || fail 2 "nothing was deleted; --yes asks nothing."
  fi
  delete_tpu
  say "deleted"
}

dry=()
while [ "${1:-}" = --dry-run ]; do
  dry=(--dry-run)
  shift
done
verb=${1:-}
case $verb in
  create | setup | run | logs | status | stop | resume | keep | fetch | delete) ;;
  '')
    sed -n '2,/^set -e/s/^# \{0,1\}//p' launch/tpu.sh
    exit 2
    ;;
  *) usage "'$verb' is no verb" ;;
esac
shift
parse "${dry[@]}" "$@"
needs name "$name"
needs zone "$zone"
check_flags
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail 1 "gcloud is missing;" \
  "install it: https://cloud.google.com/sdk/docs/install"
"$verb"
