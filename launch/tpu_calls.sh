# shellcheck shell=bash
# What launch/tpu.sh is made of: the calls of gcloud, sourced. Every command goes
# through `call`, which prints it instead of running it in a dry run.
# Exit statuses: 1 something failed, 2 the flags are wrong, 3 no TPU can be had
# now (quota or capacity), 6 a worker could not be reached.

# shellcheck disable=SC2154  # launch/tpu_flags.sh fills name, zone, ...

# Of each worker: "NODE K", and what it answered.
workers=() statuses=()

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
said=$tmp/said # what the last call said on stderr
exec 3>&1      # where a dry run prints, also from within $(..)

fail() { # STATUS MESSAGE..
  local status=$1
  shift
  echo "error: $*" >&2
  exit "$status"
}

say() { [ -n "$dry_run" ] || echo "$name: $*" >&2; }

# Quotes a command line for a shell: the person's, and the one on the worker.
quoted() {
  local word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    printf '%s ' "$word"
  done | sed 's/ $/\n/'
}

# Runs a command of gcloud; prints what it prints.
call() {
  if [ -n "$dry_run" ]; then
    quoted "$@" >&3
    return
  fi
  "$@" 2>"$said" </dev/null 3>&-
}

# One line and a remedy for what gcloud said, and the exit.
explain() { # WHAT
  local all line
  all=$(grep -v '^WARNING' "$said" || true)
  line=$(sed -n '/^ERROR/,$p' <<<"$all" | tr -s ' \n' ' ' | cut -c1-300)
  case $all in
    *'gcloud auth login'* | *'Reauthentication'*)
      fail 1 "$1: gcloud is not logged in; run \"gcloud auth login\"."
      ;;
    *QUOTA_EXCEEDED* | *[Qq]uota*exceeded* | *exceed*[Qq]uota*)
      fail 3 "$1: quota exceeded ($line); wait, ask for more on the console's" \
        "page IAM & Admin > Quotas, or take another --zone or --type."
      ;;
    *'no more capacity'* | *[Ii]nsufficient*capacity* | *RESOURCE_EXHAUSTED* \
      | *STOCKOUT*)
      fail 3 "$1: no capacity in $zone ($line); wait in line with --queued, or" \
        "take another --zone or --type."
      ;;
    *PERMISSION_DENIED* | *'does not have permission'*)
      fail 1 "$1: not allowed ($line); is --project right, the TPU API enabled" \
        "and your role TPU Admin?"
      ;;
    *) fail 1 "$1: ${line:-$(last_line "$said")}" ;;
  esac
}

last_line() { grep -v '^ *$' "$1" | tail -n 1 || true; }

missing() { grep -q 'NOT_FOUND\|not found' "$said"; }

# The names of the nodes: the slices of a multislice, else the TPU itself.
nodes() {
  local i
  if [ "$num_slices" -eq 1 ]; then
    echo "$name"
  else
    for ((i = 0; i < num_slices; i++)); do echo "$name-$i"; done
  fi
}

# Fields of one TPU or request, or "absent".
describe() { # KIND NAME FIELD
  call gcloud compute tpus "$1" describe "$2" "${where[@]}" \
    --format="value($3)" && return
  missing || explain "describe $2"
  echo absent
}

# The state of the TPU, or "absent". A queued resource is what the first of its
# nodes is that is not READY; one that is gone counts as preempted.
state() {
  local now node
  if [ -z "$queued" ]; then
    describe tpu-vm "$name" state
    return
  fi
  now=$(describe queued-resources "$name" state.state)
  if [ "$now" = ACTIVE ]; then
    for node in $(nodes); do
      now=$(describe tpu-vm "$node" state)
      [ "$now" = READY ] || break
    done
    now=${now/absent/PREEMPTED}
  fi
  echo "$now"
}

create_tpu() {
  local flags=("${where[@]}" --accelerator-type="$type")
  [ -z "$spot" ] || flags+=(--spot)
  if [ -z "$queued" ]; then
    call gcloud compute tpus tpu-vm create "$name" "${flags[@]}" \
      --version="$version" >&2 || explain "create $name"
    return
  fi
  if [ "$num_slices" -gt 1 ]; then
    flags+=(--node-count="$num_slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  [ -z "$valid_until" ] || flags+=(--valid-until-duration="$valid_until")
  call gcloud compute tpus queued-resources create "$name" "${flags[@]}" \
    --runtime-version="$version" >&2 || explain "create $name"
}

delete_tpu() {
  local kind=tpu-vm flags=("${where[@]}")
  [ -z "$queued" ] || kind=queued-resources flags+=(--force)
  call gcloud compute tpus "$kind" delete "$name" "${flags[@]}" >&2 \
    || missing || explain "delete $name"
}

# Fills `workers` with "NODE K", a line for each worker of each node. In a dry
# run only worker 0, because gcloud is not asked how many there are.
find_workers() {
  local node answer now count k
  workers=()
  for node in $(nodes); do
    answer=$(describe tpu-vm "$node" 'state,networkEndpoints.len()')
    if [ -n "$dry_run" ]; then
      workers+=("$node 0")
      continue
    fi
    [ "$answer" != absent ] || fail 1 "there is no TPU $node in $zone;" \
      "\"create\" makes it, \"resume\" also starts its run again."
    read -r now count <<<"$answer"
    [ "$now" = READY ] || fail 1 "$node is $now, not READY; \"resume\" replaces" \
      "a TPU that was preempted."
    for ((k = 0; k < count; k++)); do workers+=("$node $k"); done
  done
}

# Runs a command line on one worker. The two options end a connection that is
# dead; gcloud itself tries ten times before it gives up.
on_worker() { # NODE K COMMAND-LINE
  call gcloud compute tpus tpu-vm ssh "$1" --worker="$2" "${where[@]}" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15 \
    --command="$3"
}

# Calls FUNCTION NODE K ARGUMENTS.., its output in $tmp/NODE.K.out, what was said
# on stderr in .err, its status in .rc.
one() { # FUNCTION NODE K ARGUMENTS..
  local said=$tmp/$2.$3.err rc=0
  "$@" >"$tmp/$2.$3.out" || rc=$?
  echo "$rc" >"$tmp/$2.$3.rc"
}

# The same for all workers, 16 at a time.
each() { # FUNCTION
  local worker node k at=0
  for worker in "${workers[@]}"; do
    read -r node k <<<"$worker"
    if [ -n "$dry_run" ]; then
      "$1" "$node" "$k"
      continue
    fi
    one "$1" "$node" "$k" &
    at=$((at + 1))
    [ $((at % 16)) -ne 0 ] || wait
  done
  wait
}

# Fails with the first worker whose call of `each` did not work: what worker.sh
# said, or that it was not reached.
all_worked() { # WHAT
  local worker base line
  [ -z "$dry_run" ] || return 0
  for worker in "${workers[@]}"; do
    base=$tmp/${worker/ /.}
    [ "$(cat "$base.rc")" -ne 0 ] || continue
    ! grep -q '^ERROR: (gcloud' "$base.err" || unreachable "$worker" "$base.err"
    line=$(grep '^error: ' "$base.err" | tail -n 1 || last_line "$base.err")
    fail 1 "$1 on worker ${worker/* /} of ${worker/ */}: ${line#error: }"
  done
}

unreachable() { # "NODE K" FILE
  fail 6 "worker ${1/* /} of ${1/ */} could not be reached by ssh" \
    "($(last_line "$2")); if it stays so, \"delete\"" \
    "and \"resume\" give a new TPU."
}

# A worker answers with its state; before the first setup there is no script.
ask_status() { # NODE K
  on_worker "$1" "$2" 'if [ -e bond_jax/launch/worker.sh ]; then bond_jax/launch/worker.sh status; else echo new; fi'
}

# Fills `statuses`, a line for each worker: new, none, running, finished N, lost
# or unreachable.
find_statuses() {
  local worker base
  statuses=()
  each ask_status
  [ -z "$dry_run" ] || return 0
  for worker in "${workers[@]}"; do
    base=$tmp/${worker/ /.}
    if [ "$(cat "$base.rc")" -eq 0 ]; then
      statuses+=("$(cat "$base.out")")
    else
      statuses+=(unreachable)
    fi
  done
}

all_reached() {
  local i
  for i in "${!statuses[@]}"; do
    [ "${statuses[i]}" != unreachable ] \
      || unreachable "${workers[i]}" "$tmp/${workers[i]/ /.}.err"
  done
}

# Whether a worker has one of these statuses, "finished" for every "finished N".
# No pipe: under pipefail a reader that leaves early turns yes into no.
some() { # STATUS|STATUS..
  local IFS=$'\n'
  [[ $IFS${statuses[*]} =~ $IFS($1) ]]
}
