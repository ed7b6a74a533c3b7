#!/usr/bin/env bash
# Runs one command of bond_jax on the TPU VM that you are logged in to:
#
#     launch/tpu_vm.sh movie_reviews --data_dir=data
#     launch/tpu_vm.sh sft --config=configs/demo.py --workdir=runs/demo
#     launch/tpu_vm.sh setup            # the environment alone
#
# The first call makes the environment .venv-tpu: requirements.txt, and the
# libtpu that the jax pinned there asks for. Later calls find it made; a
# changed requirements.txt makes it anew. The status is that of the command.
#
# Of a slice of several hosts, or of several slices, every host must run the
# same command at the same time: launch/tpu.sh does that from your machine. No
# XLA or libtpu flag is set here: none has been measured to help. This script
# has not run on a TPU yet.
set -euo pipefail
cd "$(dirname "$0")/.."

# The Python of TPU VM images, Ubuntu 22.04, is 3.10. uv brings a newer one that
# touches nothing of the system: itself a wheel that pip fetches over https, it
# needs neither root, nor a package source and its key, nor apt's lock.
UV=0.13.9
PYTHON_VERSION=3.12

fail() {
  echo "error: $*" >&2
  exit 2
}

metadata() {
  curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1" \
    || true
}

# Prints the path of a usable Python, and installs one if there is none.
usable_python() {
  local folder=$HOME/.local/share/bond_jax/uv
  launch/find_python.sh 2>/dev/null && return
  echo "no Python from 3.11 to 3.13 here: uv installs $PYTHON_VERSION" >&2
  python3 -m pip install --quiet --target="$folder" --upgrade "uv==$UV" >&2 \
    || fail "python3 -m pip could not install uv; install Python" \
      "$PYTHON_VERSION on PATH, and run this again."
  "$folder/bin/uv" python install --quiet "$PYTHON_VERSION" >&2 \
    || fail "uv could not install Python $PYTHON_VERSION; install it on PATH," \
      "and run this again."
  "$folder/bin/uv" python find --managed-python "$PYTHON_VERSION"
}

known=$(grep -l "__name__ == '__main__'" bond_jax/*.py \
  | sed 's|.*/\(.*\)\.py|\1|' | xargs)
command=${1:-}
case " setup $known " in
  *" ${command:-none} "*) shift ;;
  *) fail "'$command' is no command; give one of $known, then its flags." ;;
esac

hosts=${TPU_WORKER_HOSTNAMES:-$(metadata worker-network-endpoints)}
[ -n "$hosts" ] || fail "this is no TPU VM: the metadata server names no" \
  "worker. If it is one, alone, set TPU_WORKER_HOSTNAMES=localhost."

python=.venv-tpu/bin/python
if ! cmp --silent requirements.txt .venv-tpu/.done; then
  base=$(usable_python)
  echo "creating .venv-tpu with $base"
  rm -rf .venv-tpu
  "$base" -m venv .venv-tpu
  "$python" -m pip install --quiet --upgrade pip
  "$python" -m pip install --quiet -r requirements.txt 'jax[tpu]'
  "$python" -m pip check
  cp requirements.txt .venv-tpu/.done
fi
[ "$command" != setup ] || exit 0

# Without a TPU jax would fall back to the CPU in silence; so it stops instead.
export JAX_PLATFORMS=tpu,cpu
# Programs of real sizes compile for minutes: a run that goes on finds them.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/bond_jax}
export PYTHONUNBUFFERED=1
exec "$python" -m "bond_jax.$command" "$@"
