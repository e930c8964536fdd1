#!/usr/bin/env bash
# The default model against the dense model of the same active size, same tokens, three seeds each.
# usage: scripts/bench/moe_vs_dense.sh [overrides]; runs go to runs/moe_vs_dense, the table to standard output.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv="$(scripts/setup.sh)"
for model in deepseek_moe_tiny dense_tiny; do
    for seed in 0 1 2; do
        "$venv/bin/python" -m moetrain train "model=$model" "train.seed=$seed" "run.dir=runs/moe_vs_dense/$model-$seed" \
            metrics.eval_batches=1000 logging.sample_prompt=null logging.display=plain "$@" > /dev/null
    done
done
"$venv/bin/python" - <<'PY'
import json, statistics
for model in ("deepseek_moe_tiny", "dense_tiny"):
    last = [json.loads(open(f"runs/moe_vs_dense/{model}-{seed}/metrics.jsonl").read().splitlines()[-1]) for seed in range(3)]
    losses = [line["eval_loss"] for line in last]
    print(f"{model:20s} held-out loss {statistics.mean(losses):.4f} +- {statistics.stdev(losses):.4f}  {losses}")
PY
