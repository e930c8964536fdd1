"""What a rank keeps: its part of the experts' state, copies within their slots, and none after the forward if they are freed."""

import pytest

from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.testing.distributed import run_distributed
from moetrain.testing.memory import measure
from moetrain.testing.scenarios import deepseek, drawn

WIDTH = 256
EXPERT = 3 * 16 * WIDTH * 8
"""Bytes of one expert's parameters in float64; its state has as many in gradients and in two moments."""
LAYERS, EXPERTS = 2, 6


def wide(made):
    """Experts that outweigh everything else."""
    made.parts.experts.width = WIDTH
    return made


SCENARIO = wide(drawn("zipf"))
KEPT = Layout("zero3_experts", 1, 4, FSSDPSettings(planner="everywhere", split="even"))
FREED = Layout("zero3_experts", 1, 4, FSSDPSettings(planner="everywhere", split="even", rematerialize=True))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["ep", "fssdp"])
def test_a_rank_keeps_its_part_of_the_experts_state(name, ranks):
    layout = Layout("ep", 1, ranks) if name == "ep" else Layout("fssdp", 1, ranks, FSSDPSettings(extra_slots=1))
    sizes = [memory.experts / (4 * EXPERT * LAYERS) for memory in run_distributed(measure, ranks, SCENARIO, layout)]
    assert sum(sizes) == EXPERTS
    assert all(size == int(size) and abs(size - EXPERTS / ranks) < 1 for size in sizes)


@pytest.mark.parametrize("slots", [1, 3])
def test_copies_fit_into_their_slots(slots):
    kept, freed = (
        run_distributed(measure, 4, SCENARIO, Layout("fssdp", 1, 4, FSSDPSettings(extra_slots=slots, rematerialize=rematerialize)))
        for rematerialize in (False, True)
    )
    assert 0 < max(memory.copies for memory in kept) <= LAYERS * slots * EXPERT
    # at no time are the copies of two layers there
    assert 0 < max(memory.copies for memory in freed) <= slots * EXPERT


def test_experts_everywhere_are_copied_from_all_other_ranks():
    for memories, layers in ((run_distributed(measure, 4, SCENARIO, KEPT), LAYERS), (run_distributed(measure, 4, SCENARIO, FREED), 1)):
        for memory in memories:
            owned = memory.experts / (4 * EXPERT * LAYERS)
            assert memory.copies == layers * (EXPERTS - owned) * EXPERT


def test_rematerialisation_gives_the_copies_memory_back_after_the_forward():
    scenario = wide(deepseek(steps=2))
    kept, freed = (run_distributed(measure, 4, scenario, layout, True) for layout in (KEPT, FREED))
    for with_copies, without in zip(kept, freed, strict=True):
        # the allocator's own figures; what the process allocates once differs by some 20 kB
        assert with_copies.after_forward - without.after_forward == pytest.approx(with_copies.copies, rel=0.05)
