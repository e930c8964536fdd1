"""Applying a step's gradients, or leaving everything alone if they are not finite."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.moe.context import LayerStatistics
from moetrain.parallel.layouts import Layout
from moetrain.testing.layouts import Training
from moetrain.testing.scenarios import SCENARIOS
from moetrain.train.optim import AdamWConfig, ConstantConfig, CosineConfig, WSDConfig, parameter_groups
from moetrain.train.run import Trainer
from moetrain.train.state import Progress
from moetrain.train.step import StepResult


class OneLayer:
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(4, 3))
        self.norm = torch.nn.Parameter(torch.ones(3))
        self.ends = []
        self.owned = frozenset()
        router = SimpleNamespace(end_step=self.ends.append)
        self.model = SimpleNamespace(moe_layers=lambda: {"layers.0.ffn": SimpleNamespace(router=router)})

    def parameters(self):
        return iter([("weight", self.weight), ("norm.weight", self.norm)])

    def frozen_routers(self):
        return []

    def clip_gradients(self, max_norm):
        return torch.linalg.vector_norm(torch.cat([p.grad.flatten() for _, p in self.parameters()]).double())


@pytest.fixture
def trainer():
    placed = OneLayer()
    optim = AdamWConfig(lr=0.1)
    config = SimpleNamespace(optim=optim, schedule=ConstantConfig(warmup_steps=4), train=SimpleNamespace(steps=10))
    return SimpleNamespace(placed=placed, optimizer=optim.build(placed), config=config, progress=Progress())


def result(loss=1.0):
    count = torch.ones(2, dtype=torch.long)
    return StepResult(loss, {}, 2, {"layers.0.ffn": LayerStatistics(count, count, torch.zeros(()), torch.tensor(1))})


@pytest.mark.parametrize(("gradient", "loss"), [(float("inf"), 1.0), (float("nan"), 1.0), (1.0, float("nan"))])
def test_a_step_that_is_not_finite_leaves_everything_untouched(trainer, gradient, loss):
    for _, p in trainer.placed.parameters():
        p.grad = torch.full_like(p, 0.5)
    Trainer.update(trainer, result())
    before = [p.detach().clone() for _, p in trainer.placed.parameters()]
    state = [{k: v.clone() for k, v in trainer.optimizer.state[p].items()} for _, p in trainer.placed.parameters()]
    trainer.placed.weight.grad[1, 1] = gradient
    lr, norm, skipped = Trainer.update(trainer, result(loss))
    assert skipped and trainer.progress.updates == 1 and trainer.progress.skipped_in_a_row == 1
    assert len(trainer.placed.ends) == 1
    for (_, p), old, old_state in zip(trainer.placed.parameters(), before, state, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(trainer.optimizer.state[p][k], v) for k, v in old_state.items())
    # the learning rate goes by updates: the next good step has the one that the bad step would have had
    trainer.placed.weight.grad[1, 1] = 0.5
    assert Trainer.update(trainer, result())[0] == lr
    assert trainer.progress.skipped_in_a_row == 0


def test_vectors_are_not_decayed():
    groups = parameter_groups(OneLayer(), 0.1)
    assert sorted((group["weight_decay"], len(group["params"])) for group in groups) == [(0.0, 1), (0.1, 1)]


def test_schedules():
    cosine = CosineConfig(warmup_steps=10, final_factor=0.1)
    factors = [cosine.factor(i, 110) for i in range(110)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55) and factors[-1] == pytest.approx(0.1, abs=0.01)
    wsd = WSDConfig(warmup_steps=10, final_factor=0.0, decay_fraction=0.2)
    assert wsd.factor(89, 110) == 1.0 and wsd.factor(100, 110) == pytest.approx(0.5)
    exponential = WSDConfig(warmup_steps=0, final_factor=0.01, decay_fraction=0.5, shape="exponential")
    assert exponential.factor(75, 100) == pytest.approx(0.1)
    assert ConstantConfig(warmup_steps=0).factor(99, 100) == 1.0


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_all_parameters_are_updated_by_the_fused_kernel():
    training = Training.start(0, SCENARIOS["deepseek"], Layout("single", 1, 1))
    training.gradients(0)
    before = {name: p.detach().clone() for name, p in training.placed.parameters()}
    with Operations() as seen:
        training.optimizer.step()
    assert "aten::_fused_adamw_" in seen.names
    assert not {name for name in seen.names if "addcdiv" in name or "lerp" in name or "sqrt" in name}
    assert all(not torch.equal(before[name], p) for name, p in training.placed.parameters())
    assert any(".experts." in name for name in before)
