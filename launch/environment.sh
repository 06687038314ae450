# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment (VENV, by default .venv) with this package and some extras.
# Usage: source launch/environment.sh [EXTRAS]

python_at_least_3_11() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

prepare_environment() {
  local venv=${VENV:-.venv} extras=${1:+[$1]} quiet=--quiet candidate
  if [ ! -x "$venv/bin/python" ]; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
      if python_at_least_3_11 "$candidate"; then
        "$candidate" -m venv "$venv"
        quiet=  # The first installation takes long enough to be watched.
        break
      fi
    done
    if [ ! -x "$venv/bin/python" ]; then
      echo "error: no Python 3.11 or newer with its venv module found; name one with PYTHON=..." >&2
      return 1
    fi
  fi
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --editable ".$extras"
  PATH=$(cd "$venv/bin" && pwd):$PATH
}
