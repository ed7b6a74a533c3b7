#!/usr/bin/env bash
# Prints the path of a Python that can run this project: 3.12, else 3.13, else
# 3.11; first what is on PATH, then what pyenv has installed. One line and
# status 1 if there is none.
set -euo pipefail

# Asks it for its version, because a pyenv shim may be there and only answer
# "command not found". Prints its path; of a virtual environment, that of its base.
works() {
  "$1" -c 'import sys, venv, ensurepip
if "%d.%d" % sys.version_info[:2] != sys.argv[1]: sys.exit(1)
print(sys._base_executable)' "$2" 2>/dev/null
}

pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
for version in 3.12 3.13 3.11; do
  for name in "python$version" python3 python; do
    works "$name" "$version" && exit 0
  done
  for path in "$pyenv_root"/versions/"$version"*/bin/python; do
    works "$path" "$version" && exit 0
  done
done

found=$(python3 -c 'import platform; print(platform.python_version())' \
  2>/dev/null || echo none)
echo "error: no usable Python: needed is 3.12, 3.13 or 3.11 with its venv" \
  "module, on PATH or among pyenv's versions (python3 here: $found)." \
  "Install one, for instance with \"pyenv install 3.12\"." >&2
exit 1
