#!/usr/bin/env bash
# Makes the virtual environment ($MOETRAIN_VENV, default .venv) and installs moetrain in it, editable, with the
# pinned versions. Prints the environment's folder. A second call finds everything in place and installs nothing.
# usage: scripts/setup.sh [extra]   (extra: dev, wandb, ...; default none)
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
venv="${MOETRAIN_VENV:-.venv}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moetrain needs Python 3.11 or newer; PYTHON=... chooses one" >&2; exit 1; }
# what an installation depends on: these files and the extra
want="$(cat pyproject.toml constraints.txt | cksum | tr ' ' -)"
mark="$venv/.moetrain-installed${extra:+-$extra}"
if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$want" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "installing moetrain${extra:+[$extra]} into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}" >&2
    echo "$want" > "$mark"
fi
echo "$venv"
