#!/usr/bin/env bash
# Installs what is needed, then runs the whole test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="$(scripts/setup.sh dev)"
# one thread per process: the distributed tests run several at once
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest "$@"
