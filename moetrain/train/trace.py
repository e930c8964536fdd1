"""A trace of some steps of a run, one file per rank, that opens in Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.storage import storage_errors


class Tracer:
    """Records steps first .. first + steps - 1 (the first of a run is 1) of this rank; nothing if first is None.

    A run that starts or resumes within them records the rest, in place of what was there; one that ends within
    them writes what it has.
    """

    def __init__(self, path: Path, *, first: int | None, steps: int) -> None:
        self.path = path
        self.steps = range(0) if first is None else range(first, first + steps)
        self.profiler: profile | None = None

    def begin(self, step: int) -> None:
        """Before a step."""
        if self.profiler is None and step in self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def end(self, step: int) -> None:
        """After a step."""
        if step + 1 not in self.steps:
            self.close()

    def close(self) -> None:
        """Write what has been recorded."""
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(self.path))
