#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than nine minutes on a bare machine: Python and torch with CUDA; Triton,
# safetensors, transformers, pytest and other implementations of the layer are used if they are there.
# Results go to $OUT (default: scripts/bench/results/local): summary.md, summary.json, results.json, trace.json.gz, log.txt.
# Arguments are handed on: scripts/gpu_suite.sh --parts kernels layer
# MOETRAIN_GPU_SUITE=tiny runs the same parts at toy size, also on CPU, to see that nothing fails for silly reasons.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-scripts/bench/results/local}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/bench/gpu_suite.py --out "$OUT" --size "${MOETRAIN_GPU_SUITE:-full}" "$@"
