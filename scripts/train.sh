#!/usr/bin/env bash
# Installs what is needed and trains the default model on text that is already on this machine.
# Arguments are overrides for `moetrain train`, e.g.: scripts/train.sh train.steps=50 launch.nproc_per_node=2
set -euo pipefail
cd "$(dirname "$0")/.."
venv="$(scripts/setup.sh)"
exec "$venv/bin/python" -m moetrain train "$@"
