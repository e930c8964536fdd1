"""Memory by formula, against models counted by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from moetrain.parallel.layouts import FSSDPSettings
from moetrain.parallel.scheduling import layer_cost
from moetrain.simulate.memory import copy_bytes, dense_bytes, rank_memory

EXPERT = 3 * 16 * 8


def test_sizes_add_up_to_the_model(model, sizes):
    experts = sizes.num_experts * sum(sizes.expert_parameters)
    assert sizes.expert_parameters == [EXPERT, EXPERT] and experts == 2 * 8 * EXPERT
    assert sizes.root + sum(sizes.blocks) + experts == sum(p.numel() for p in model.parameters())
    assert sizes.root == 2 * 50 * 16 + 16 and sizes.parameter_bytes == 4 and sizes.dtype == torch.bfloat16
    attention = 4 * 16 * 16
    assert [layer.mixer_parameters for layer in sizes.layers] == [attention, attention]
    assert sizes.blocks[0] == attention + 3 * 16 * 32 + 2 * 16


@pytest.fixture
def costs(sizes, cluster):
    def make(rematerialize=False):
        settings = FSSDPSettings(rematerialize=rematerialize)
        return [layer_cost(each.experts, 16, torch.bfloat16, settings, mixer_flops=1e6, cluster=cluster) for each in sizes.layers]

    return make


def test_one_rank_holds_everything_once(sizes, costs):
    dense = sizes.root + sum(sizes.blocks)
    assert dense_bytes(sizes, 1) == 16 * dense
    memory = rank_memory(sizes, np.full((2, 1), 8), np.zeros((2, 1), dtype=np.int64), costs())
    assert memory.owned_experts == 16 * 16 * EXPERT and memory.copies == 0 and memory.total == 16 * (dense + 16 * EXPERT)


def test_shares_shrink_with_the_ranks_and_what_is_gathered_does_not(sizes):
    dense = sizes.root + sum(sizes.blocks)
    gathered = 4 * (2 * sizes.root + 3 * max(sizes.blocks))
    for ranks in (2, 8):
        assert 0 <= dense_bytes(sizes, ranks) - gathered - 16 * dense / ranks < 16


def test_copies_of_all_layers_or_of_two_in_flight(sizes, costs):
    copies = np.array([[3, 0], [1, 2]])
    # bfloat16 on the wire: 2 bytes for a weight, 2 for its gradient
    assert copy_bytes(copies, costs()).tolist() == [4 * EXPERT * 4, 2 * EXPERT * 4]
    deep, made = np.tile(copies, (4, 1)), costs() * 4
    assert copy_bytes(deep, made)[0] == 16 * EXPERT * 2 + 6 * EXPERT * 2
    rematerialized = [dataclasses.replace(cost, rematerialize=True) for cost in made]
    assert copy_bytes(deep, rematerialized).tolist() == [6 * EXPERT * 4, 4 * EXPERT * 4]


def test_the_fullest_rank_counts(sizes, costs):
    owned, copies = np.array([[5, 3], [4, 4]]), np.array([[0, 0], [0, 8]])
    memory = rank_memory(sizes, owned, copies, costs())
    assert (memory.owned_experts, memory.copies) == (9 * 16 * EXPERT, 0)
    memory = rank_memory(sizes, owned, 9 * copies, costs())
    assert (memory.owned_experts, memory.copies) == (7 * 16 * EXPERT, 72 * 4 * EXPERT)
