"""What one rank of a layout keeps in memory: its part of the training state, copies of experts, and the peaks of a few steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

from torch import Tensor
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.moe.experts import Experts
from moetrain.parallel import executor
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import local
from moetrain.testing.layouts import Scenario, Training

FORWARD_END = "end of forward"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    experts, dense: parameters, gradients and optimizer moments that the rank keeps. copies: of experts, in memory or under
    way, at most at one time. resident: peak of the process above its start, None if allocations were traced (tracing needs
    memory itself). allocated, after_forward: what torch's CPU allocator had handed out, at its peak and at the end of the
    last forward pass; None unless traced.
    """

    experts: int
    dense: int
    copies: int
    resident: int | None = None
    allocated: int | None = None
    after_forward: int | None = None


def measure(rank: int, world_size: int, scenario: Scenario, layout: Layout, trace: bool = False) -> Memory:
    """Train the scenario's steps on this rank and measure. Resident memory: Linux only, in a process that has done nothing
    else. trace: allocations, by torch's profiler, from before the model is built."""
    gc.collect()
    if trace:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            experts, dense, copies = train(rank, scenario, layout)
        allocated, after_forward = allocations(profiler)
        return Memory(experts, dense, copies, allocated=allocated, after_forward=after_forward)
    start = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    experts, dense, copies = train(rank, scenario, layout)
    return Memory(experts, dense, copies, resident=status_bytes("VmHWM") - start)


def train(rank: int, scenario: Scenario, layout: Layout) -> tuple[int, int, int]:
    """Bytes of the state of experts and of everything else, and the most bytes of copies."""
    with metered_copies() as held:
        training = Training.start(rank, scenario, layout)

        def mark(*_: object) -> None:
            with record_function(FORWARD_END):
                pass

        training.placed.model.norm.register_forward_hook(mark)
        for step in range(scenario.steps):
            result = training.gradients(step)
            experts, dense = state_bytes(training)
            training.update(step, result)
    return experts, dense, held.peak


def state_bytes(training: Training) -> tuple[int, int]:
    """Bytes of parameters, gradients and moments on this rank: of experts, and of everything else."""
    model = training.placed.model
    in_experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        moments = [t for t in training.optimizer.state[parameter].values() if t.shape == parameter.shape]
        gradient = [] if parameter.grad is None else [parameter.grad]
        sizes[id(parameter) in in_experts] += sum(num_bytes(t) for t in (parameter, *gradient, *moments))
    return sizes[True], sizes[False]


def num_bytes(tensor: Tensor) -> int:
    """Of this rank's part."""
    return local(tensor).numel() * tensor.element_size()


class HeldCopies:
    """Bytes of copies that exist now, and the most that ever did."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.peak = 0

    def note(self, copies: executor.Copies) -> None:
        """Take the state of these copies into account."""
        is_here = copies.buffer is not None or copies.pending is not None
        self.now[id(copies)] = len(copies.transfer.copied) * sum(copies.sizes) * copies.dtype.itemsize * is_here
        self.peak = max(self.peak, sum(self.now.values()))


@contextmanager
def metered_copies() -> Iterator[HeldCopies]:
    """Within the block, executors' copies are counted."""
    held = HeldCopies()

    class Metered(executor.Copies):
        def post(self) -> None:
            super().post()
            held.note(self)

        def free(self) -> None:
            super().free()
            held.note(self)

    with mock.patch.object(executor, "Copies", Metered):
        yield held


def allocations(profiler: profile) -> tuple[int, int]:
    """Bytes handed out by the CPU allocator since the profiler's start: the most, and those at the last mark."""
    events: list[_ProfilerEvent] = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while pending:
        event = pending.pop()
        events.append(event)
        pending.extend(event.children)
    # by address, not by the process's total: what is older than the trace may be freed within it
    sizes: dict[int, int] = {}
    now = peak = marked = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        kind, fields = event.typed
        fields = cast(Any, fields)  # of the kind's own type
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            now -= sizes.pop(fields.ptr, 0)
            if fields.alloc_size > 0:
                sizes[fields.ptr] = fields.alloc_size
                now += fields.alloc_size
            peak = max(peak, now)
        elif event.name == FORWARD_END:
            marked = now
    return peak, marked


def status_bytes(field: str) -> int:
    """A size that the kernel gives for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
