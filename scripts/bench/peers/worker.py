"""One implementation of the MoE layer in a process of its own, for layer.py: reads commands, one JSON object a line, and answers.

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
from safetensors.torch import load_file

from moetrain.testing.layer_bench import (
    CopyLimit,
    DenseLimit,
    LayerCase,
    Unsupported,
    cast_inputs,
    peak_bytes,
    time_step,
    worst_error,
)

LIMITS = {"dense": DenseLimit, "copy": CopyLimit}


def load_adapter(name: str) -> ModuleType:
    """The module beside this file, which may have the name of the package that it adapts."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        gc.collect()
        layer_case = LayerCase(**case)
        result: dict[str, Any] = {}
        if self.adapter is None:
            self.layer = LIMITS[self.kind](layer_case, self.device)
        else:
            result = self.build(layer_case, inputs, expected)
        for _ in range(warmup):
            self.run()
        gc.collect()
        gc.freeze()  # what was imported needs no search for garbage within a measurement
        return result

    def build(self, layer_case: LayerCase, inputs: str, expected: str) -> dict[str, Any]:
        """Error and peak memory of the first steps."""
        self.layer = self.adapter.build(layer_case, cast_inputs(load_file(inputs), layer_case, self.device), self.variant)
        self.layer.prepare()
        self.layer.step()
        error, tensor = worst_error(self.layer.results(), load_file(expected), layer_case)
        return {"error": error, "worst": tensor, "peak_bytes": peak_bytes(self.layer, self.device)}

    def run(self) -> dict[str, float]:
        """One step."""
        if self.adapter is not None:
            self.layer.prepare()
        return time_step(self.layer.step, self.device)._asdict()


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
    try:
        worker = Worker(name, torch.device(device))
        first = worker.describe()
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        first = {"failed": f"not installed: {error}"}
    print(json.dumps(first), file=answers, flush=True)
    if "failed" not in first:
        for line in sys.stdin:
            print(json.dumps(answer(worker, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
