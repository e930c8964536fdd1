"""Write a balanced table of experts by token id for router=hash or router=token_table, from the training data's counts.

usage: python scripts/hash_table.py table.npy model.num_experts=32 data=stdlib [other settings of moetrain train]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from moetrain.data import prepare
from moetrain.launch.compose import build_config, run_application
from moetrain.moe.routers.hashing import balanced_table


def main(path: str, overrides: list[str]) -> None:
    def job(plain: dict[str, Any]) -> None:
        config = build_config(plain)
        data = prepare(config.data)
        counts = np.bincount(data.train.tokens, minlength=data.vocab_size)
        table = balanced_table(counts, config.experts.num_experts)
        np.save(path, table)
        loads = np.bincount(table, weights=counts, minlength=config.experts.num_experts)
        print(f"{path}: {len(table)} token ids, busiest expert {loads.max() / loads.mean():.3f} times the average load")

    run_application(overrides, job)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".npy"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
