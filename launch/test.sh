#!/usr/bin/env bash
# The tests, from a fresh clone: bash launch/test.sh [PYTEST OPTIONS]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment test
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@"
