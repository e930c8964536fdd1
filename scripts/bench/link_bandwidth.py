"""Bandwidth of a gloo transfer from rank 0 to rank 1 (torchrun's variables): one JSON line from rank 0."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist


def measure(size: int, repeats: int) -> list[float]:
    """Seconds from the start of each transfer of ``size`` bytes until the receiver has confirmed it; a first one, which
    empties the links' token buckets, is left out."""
    payload, confirmation = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(payload, 1)
            dist.recv(confirmation, 1)
        else:
            dist.recv(payload, 0)
            dist.send(confirmation, 0)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--bytes", type=int, default=8 << 20)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    dist.init_process_group("gloo")
    seconds = measure(options.bytes, options.repeats)
    if dist.get_rank() == 0:
        print(json.dumps({"bytes": options.bytes, "seconds": seconds, "bytes_per_second": options.bytes / statistics.median(seconds)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
