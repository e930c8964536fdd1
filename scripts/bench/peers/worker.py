"""One implementation of the MoE layer in a process of its own, for layer.py and ep_layer.py: reads commands, one JSON object a
line, and answers. With WORLD_SIZE in the environment it is one rank of expert parallelism.

Needs torch, safetensors and the implementation, in any environment; moetrain is found by PYTHONPATH.
usage: python -P worker.py ADAPTER[:VARIANT] DEVICE
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from moetrain.testing.layer_bench import (
    CopyLimit,
    DenseLimit,
    LayerCase,
    Unsupported,
    cast_inputs,
    peak_bytes,
    rank_share,
    time_step,
    worst_error,
)

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LIMITS = ("dense", "copy")


def load_adapter(name: str) -> ModuleType:
    """The module beside this file, which may have the name of the package that it adapts."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bytes_written() -> int:
    """By this process to files and sockets, where Linux says it."""
    file = Path("/proc/self/io")
    return int(file.read_text().split("wchar:")[1].split()[0]) if file.exists() else 0


class Worker:
    """What the commands act on: one case at a time."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.kind, _, self.variant = name.partition(":")
        self.adapter = None if self.kind in LIMITS else load_adapter(self.kind)
        self.layer: Any = None

    def describe(self) -> dict[str, Any]:
        """Versions."""
        package = getattr(self.adapter, "PACKAGE", None)
        version = metadata.version(package) if package else None
        threads = torch.get_num_threads()
        return {"version": version, "torch": torch.__version__, "python": platform.python_version(), "threads": threads}

    def load(self, case: dict[str, Any], inputs: str, expected: str, warmup: int) -> dict[str, Any]:
        """Build the case, check its results, warm up; the error is in units of what the precision allows."""
        self.layer = None
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the other workers need it
        if RANKS > 1 and not dist.is_initialized() and not getattr(self.adapter, "JOINS_BY_ITSELF", False):
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        layer_case = LayerCase(**case)
        result: dict[str, Any] = {}
        if self.kind == "dense":
            self.layer = DenseLimit(layer_case, self.device, RANKS)
        elif self.kind == "copy":
            self.layer = CopyLimit(layer_case, self.device)
        else:
            result = self.build(layer_case, inputs, expected)
        for _ in range(warmup):
            self.run()
        gc.collect()
        gc.freeze()  # what was imported needs no search for garbage within a measurement
        return result

    def build(self, layer_case: LayerCase, inputs: str, expected: str) -> dict[str, Any]:
        """Error and peak memory of the first steps."""
        from safetensors.torch import load_file  # here: gpu_parts.py imports this file where it may be missing

        own = rank_share(load_file(inputs), RANK, RANKS)
        self.layer = self.adapter.build(layer_case, cast_inputs(own, layer_case, self.device), self.variant)
        self.layer.prepare()
        self.layer.step()
        error, tensor = worst_error(self.layer.results(), load_file(expected), layer_case)
        return {"error": error, "worst": tensor, "peak_bytes": peak_bytes(self.layer, self.device)}

    def run(self) -> dict[str, Any]:
        """One step, which ranks begin together: seconds, bytes written to the other ranks, and how many the layer itself counted."""
        take_traffic = getattr(self.adapter, "take_traffic", lambda: None)
        if self.adapter is not None:
            self.layer.prepare()
            take_traffic()
        if dist.is_initialized():
            dist.barrier()
        before = bytes_written()
        seconds = time_step(self.layer.step, self.device)
        return {**seconds._asdict(), "written": bytes_written() - before, "counted": take_traffic()}


def answer(worker: Worker, command: dict[str, Any]) -> dict[str, Any]:
    """Of one command; what goes wrong is part of the answer."""
    try:
        result: dict[str, Any] = getattr(worker, command.pop("do"))(**command)
        return result
    except Unsupported as error:
        return {"failed": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    """Answer until the commands end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # implementations print
    name, device = sys.argv[1:]
    if device == "cuda":  # NCCL refuses two ranks on one GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        worker = Worker(name, torch.device(device))
        first = worker.describe()
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        first = {"failed": f"not installed: {error}"}
    print(json.dumps(first), file=answers, flush=True)
    if "failed" not in first:
        for line in sys.stdin:
            print(json.dumps(answer(worker, json.loads(line))), file=answers, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
