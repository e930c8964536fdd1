"""State that cannot fit is refused, and the setting to change is named."""

import torch

from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.simulate.fit import memory_problems, state_memory
from moetrain.testing.scenarios import deepseek


def model(num_experts=8):
    scenario = deepseek(num_experts=num_experts)
    with torch.device("meta"):
        return scenario.model.build(scenario.parts, vocab_size=40, dtype=torch.float32)


def test_owned_state_is_a_share_of_all_experts_and_copies_are_bounded_by_the_slots():
    expert = 3 * 16 * 12 * 4  # bytes
    layers = 2
    for ranks in (1, 2, 4):
        memory = state_memory(model(), Layout("fssdp", 1, ranks, FSSDPSettings(extra_slots=1)))
        assert memory.owned_experts == 4 * expert * layers * 8 // ranks
        assert memory.copies == (0 if ranks == 1 else 2 * expert * layers)  # copies of both layers, gradients of both in flight


def test_too_many_copies_are_a_problem_of_the_slots_and_too_large_a_model_one_of_the_layout():
    layout = Layout("fssdp", 1, 2, FSSDPSettings(extra_slots=4))
    need = state_memory(model(), layout)
    assert not list(memory_problems(model(), layout, need.total)) and not list(memory_problems(model(), layout, None))
    (problem,) = memory_problems(model(), layout, need.total - 1)
    assert (problem.field, problem.value) == ("parallel.fssdp.extra_slots", 4)
    (problem,) = memory_problems(model(), layout, need.total - need.copies - 1)
    assert (problem.field, problem.value) == ("parallel", "fssdp")
    (problem,) = memory_problems(model(), Layout("single", 1, 1), 1000)
    assert problem.field == "parallel"
