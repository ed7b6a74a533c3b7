# shellcheck shell=bash
# The flags of launch/tpu.sh, sourced: what they fill, and what they may hold.

# shellcheck disable=SC2034,SC2154  # they are read there, and $verb comes from it

name='' zone='' project='' type='' version='' spot='' queued='' num_slices=1
valid_until='' bucket='' worker=0 slice=0 workdir='' checkpoints='' yes=''
every=60 dry_run=''
# All flags as given, the command after " -- ", and what every call of gcloud
# about this TPU is given.
flags=() command=() where=()

usage() { fail 2 "$* (launch/tpu.sh alone lists verbs and flags)"; }

parse() {
  while [ $# -gt 0 ]; do
    [ "$1" = -- ] || flags+=("$1")
    case $1 in
      --) command=("${@:2}") && return ;;
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --type=?*) type=${1#*=} ;;
      --version=?*) version=${1#*=} ;;
      --num-slices=?*) num_slices=${1#*=} ;;
      --valid-until=?*) valid_until=${1#*=} ;;
      --bucket=?*) bucket=${1#*=} && bucket=${bucket#gs://} ;;
      --worker=?*) worker=${1#*=} ;;
      --slice=?*) slice=${1#*=} ;;
      --workdir=?*) workdir=${1#*=} ;;
      --every=?*) every=${1#*=} ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --checkpoints) checkpoints=1 ;;
      --yes) yes=1 ;;
      --dry-run) dry_run=1 ;;
      *) usage "'$1' is no flag; the command of a run comes after \" -- \"" ;;
    esac
    shift
  done
}

# Names go into paths, options and other names: only what Google allows.
check() { # FLAG VALUE PATTERN ALLOWED
  local LC_ALL=C # elsewhere [a-z] may hold capitals
  [[ $2 =~ ^($3)$ ]] || usage "--$1='$2': $4"
}

check_flags() {
  check name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
    'small letters, digits and -, a letter first, at most 40'
  check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, say us-west4-a'
  check project "$project" '|[a-z][a-z0-9:.-]+' 'the id of a project'
  check type "$type" '|v[0-9a-z]+-[0-9]+' \
    'an accelerator type, say v5litepod-16; see "gcloud compute tpus tpu-vm accelerator-types list --zone=..."'
  check version "$version" '|[a-z0-9.-]+' 'a runtime, say tpu-ubuntu2204-base'
  check num-slices "$num_slices" '[1-9][0-9]?' 'a number of slices'
  check valid-until "$valid_until" '|[0-9]+[smhd]' 'a duration, say 6h'
  check bucket "$bucket" '|[a-z0-9][a-z0-9._-]+[a-z0-9]' 'the name of a bucket'
  check worker "$worker" '[0-9]+' 'the number of a worker'
  check slice "$slice" '[0-9]+' 'the number of a slice'
  check workdir "$workdir" '|runs(/[A-Za-z0-9_.+-]+)+' \
    'a folder in runs/, say runs/demo'
  [[ $workdir != *..* ]] || usage "--workdir='$workdir': no .."
  check every "$every" '[0-9]+' 'seconds'
  [ "$num_slices" -eq 1 ] || queued=1
  [ -z "$valid_until" ] || [ -n "$queued" ] \
    || usage "--valid-until is for --queued alone"
  where=(--zone="$zone" --quiet)
  [ -z "$project" ] || where+=(--project="$project")
  case $version,$type in
    ,v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    ,v5p-*) version=v2-alpha-tpuv5 ;;
    ,v6e-*) version=v2-alpha-tpuv6e ;;
    ,v[234]-*) version=tpu-ubuntu2204-base ;;
    ,v*) usage "--version: no runtime is known for $type; see \"gcloud compute tpus tpu-vm versions list --zone=$zone\"" ;;
  esac
}

needs() { # FLAG VALUE
  [ -n "$2" ] || usage "$verb needs --$1"
}

# The command must be one that exists, before a TPU is made for it.
needs_command() {
  local word before=--
  [ ${#command[@]} -gt 0 ] || usage "$verb needs the command after \" -- \"," \
    "say: -- train --config=configs/demo.py --workdir=runs/demo"
  [[ ${command[*]} != *$'\n'* ]] || usage "the command has a line break"
  for word in "${command[@]}" --; do
    [ "$before" != -- ] || grep -qs "__name__ == '__main__'" \
      "bond_jax/$word.py" || usage "'$word' is no command of bond_jax"
    before=$word
  done
}
