#!/usr/bin/env bash
# Runs one command of bond_jax on the TPU VM that you are logged in to:
#
#     launch/tpu_vm.sh movie_reviews --data_dir=data
#     launch/tpu_vm.sh sft --config=configs/demo.py --workdir=runs/demo
#
# The first call makes the environment .venv-tpu: requirements.txt, and the
# libtpu that the jax pinned there asks for. Later calls find it made; a
# changed requirements.txt makes it anew. The status is that of the command.
#
# One host only. A slice of several hosts needs the same command on each of
# them, started together, and a program that joins them; that does not exist
# yet, so such a slice is refused. No XLA or libtpu flag is set here: none has
# been measured to help. This script has not run on a TPU yet.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

metadata() {
  curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1" \
    || true
}

known=$(grep -l "__name__ == '__main__'" bond_jax/*.py \
  | sed 's|.*/\(.*\)\.py|\1|' | xargs)
command=${1:-}
case " $known " in
  *" ${command:-none} "*) shift ;;
  *) fail "'$command' is no command; give one of $known, then its flags." ;;
esac

hosts=${TPU_WORKER_HOSTNAMES:-$(metadata worker-network-endpoints)}
[ -n "$hosts" ] || fail "this is no TPU VM: the metadata server names no" \
  "worker. If it is one, alone, set TPU_WORKER_HOSTNAMES=localhost."
commas=${hosts//[^,]/}
slices=${MEGASCALE_NUM_SLICES:-$(metadata tpu-env \
  | sed -n "s/^MEGASCALE_NUM_SLICES: *'\([0-9]*\)'.*/\1/p")}
if [ -n "$commas" ] || [ "${slices:-1}" -gt 1 ]; then
  fail "this TPU has $((${#commas} + 1)) hosts in ${slices:-1} slice(s), and" \
    "only one host is supported so far; use for instance v5litepod-8 or v4-8."
fi

python=.venv-tpu/bin/python
if [ ! -e .venv-tpu/.done ] || [ requirements.txt -nt .venv-tpu/.done ]; then
  base=$(launch/find_python.sh)
  echo "creating .venv-tpu with $base"
  rm -rf .venv-tpu
  "$base" -m venv .venv-tpu
  "$python" -m pip install --quiet --upgrade pip
  "$python" -m pip install --quiet -r requirements.txt 'jax[tpu]'
  "$python" -m pip check
  touch .venv-tpu/.done
fi

# Without a TPU jax would fall back to the CPU in silence; so it stops instead.
export JAX_PLATFORMS=tpu,cpu
# Programs of real sizes compile for minutes: a run that goes on finds them.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/bond_jax}
export PYTHONUNBUFFERED=1
exec "$python" -m "bond_jax.$command" "$@"
