"""Nothing between the start of a forward pass and the end of its backward makes the host wait for the device."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops import count
from moetrain.parallel.layouts import Layout
from moetrain.testing.layouts import Training
from moetrain.testing.scenarios import SCENARIOS
from moetrain.train.step import count_units, on_device

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::lift_fresh",
}  # fmt: skip
"""Operations that read a result on the host, or (lift_fresh, of torch.tensor) copy from pageable memory."""
READING = {"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"}
EXPERT_BLOCK = {"moetrain.moe.execution", "moetrain.ops.expert_ffn", "moetrain.ops.permute"}
"""On CPU the experts' products are cut by counts that are read, and so is the number of rows that a padded routing leaves. What the
block does on a GPU only the last test here can show."""


def module_of_caller() -> str:
    """The innermost module of the package on the stack; none in a backward."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("moetrain."):
            return name
        frame = frame.f_back
    return "backward"


class Operations(TorchDispatchMode):
    """Records (module, operation) of what would wait."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name == "aten::index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if masks or name in WAITING or func._schema.name == "aten::repeat_interleave":
            self.found.add((module_of_caller(), name))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """The same for methods that dispatch does not show."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING:
            self.found.add((module_of_caller(), func.__name__))
        return func(*args, **(kwargs or {}))


def forward_and_backward(scenario, device="cpu"):
    """A function that makes one pass, everything before it done."""
    training = Training.start(0, replace(scenario, dtype=torch.float32), Layout("single", 1, 1))
    training.placed.model.to(device)
    training.placed.device = torch.device(device)
    (batch,) = training.batches(0)
    totals, _ = count_units([batch], training.placed)
    batch, ctx = on_device(batch, training.placed, training=True, seed=0, step=0, total_steps=2, totals=totals)
    objective = scenario.objective.build()

    def run():
        ctx.losses.clear()
        ctx.statistics.clear()
        sums = objective(training.placed.model, batch, ctx)
        (sums.main + sum(sums.extra.values()) + sum(ctx.losses.values())).backward()

    return run


CASES = ["deepseek", "recompute", "global_balance", "aux_free", "stochastic", "momentum"]


@pytest.mark.parametrize("name", CASES)
def test_a_pass_reads_nothing_from_the_device(name, monkeypatch):
    monkeypatch.setattr(count, "_by_bincount", count._by_scatter)  # as on a device
    run, found = forward_and_backward(SCENARIOS[name]), set()
    with Operations(found), Reads(found):
        run()
    assert {module for module, _ in found} <= EXPERT_BLOCK, found


def test_the_modes_see_what_waits():
    found = set()
    x = torch.arange(4)
    with Operations(found), Reads(found):
        x[x > 1].tolist()
        x.repeat_interleave(x)
        x.sum().item()
        torch.tensor([1.0])
        torch.bincount(x)
        bool(x.any())
    names = {name for _, name in found}
    assert {"aten::index", "tolist", "aten::repeat_interleave", "aten::lift_fresh", "aten::bincount", "aten::_local_scalar_dense"} <= names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in CASES if not SCENARIOS[name].pad])
def test_a_pass_does_not_wait_for_a_gpu(name):
    run = forward_and_backward(SCENARIOS[name], "cuda")
    run()  # allocations and lazy initialisation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
