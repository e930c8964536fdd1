#!/usr/bin/env bash
# Everything that only a GPU can show, in one call on a bare machine (Python, torch with CUDA; nothing else needed).
# Results go to $OUT (default: a new folder under scripts/bench/results): one JSON file per part and summary.json.
# MOETRAIN_GPU_SUITE=tiny runs the same parts at toy size, also on CPU, to see that nothing fails for silly reasons.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-scripts/bench/results/local}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
mkdir -p "$OUT"
"$python" scripts/bench/gpu_suite.py --out "$OUT" --size "${MOETRAIN_GPU_SUITE:-full}"
