"""Index arithmetic of expert parallelism, rank detection, layouts."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.parallel.collectives import sum_over
from moetrain.parallel.indices import ranges, regroup
from moetrain.parallel.layouts import AutoConfig, EPConfig, FSDPConfig, Layout, SingleConfig
from moetrain.parallel.ranks import Ranks


@pytest.mark.parametrize("counts", [[[2, 0, 1], [1, 3, 0]], [[0, 0], [0, 0]], [[5]], [[0, 4], [0, 0], [1, 0]]])
def test_regroup_is_a_permutation_by_expert_and_back(counts):
    counts = np.array(counts)
    there = regroup(counts, torch.device("cpu"))
    rows = torch.tensor([(s, e) for s in range(counts.shape[0]) for e in range(counts.shape[1]) for _ in range(counts[s, e])]).view(-1, 2)
    grouped = rows[there.token]
    assert grouped[:, 1].tolist() == sorted(rows[:, 1].tolist())
    assert torch.equal(grouped[there.place], rows)


def test_ranges():
    assert ranges(np.array([5, 0, 2, 9]), np.array([2, 3, 0, 1]), torch.device("cpu")).tolist() == [5, 6, 0, 1, 2, 9]


def test_ranks_from_torchrun():
    assert Ranks.detect({}) == Ranks(0, 1, 0, 1)
    found = Ranks.detect({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert found == Ranks(5, 8, 1, 4) and not found.is_main


def test_layouts():
    assert AutoConfig().resolve(1) == Layout("single", 1, 1)
    assert AutoConfig().resolve(4) == Layout("ep", 1, 4)
    assert FSDPConfig(replicate=2).resolve(4) == Layout("fsdp", 2, 2)
    assert EPConfig(replicate=2, tensor=4, expert_tensor=2).resolve(16) == Layout("ep", 2, 2, tensor=4, expert_tensor=2)
    assert (Layout("ep", 2, 3, tensor=4).data_world_size, Layout("ep", 2, 3, tensor=4).world_size) == (6, 24)


@pytest.mark.parametrize(
    ("config", "world_size", "fields"),
    [
        (EPConfig(), 3, []),
        (EPConfig(tensor=2), 4, []),
        (EPConfig(tensor=4, expert_tensor=2), 4, []),
        (EPConfig(replicate=2), 3, ["parallel.replicate"]),
        (EPConfig(replicate=2, tensor=2), 6, ["parallel.tensor"]),
        (AutoConfig(tensor=2), 1, ["parallel.tensor"]),
        (EPConfig(tensor=2, expert_tensor=4), 4, ["parallel.expert_tensor"]),
        (FSDPConfig(tensor=2, expert_tensor=2), 4, ["parallel.expert_tensor"]),
        (SingleConfig(), 2, ["parallel"]),
    ],
)
def test_what_a_layout_requires_of_the_ranks(config, world_size, fields):
    assert [p.field for p in config.check("parallel", world_size=world_size, num_experts=8)] == fields


def test_every_rank_is_in_one_group_of_each_kind():
    layout = Layout("ep", 2, 2, tensor=4, expert_tensor=2)
    assert layout.tensor_groups() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert layout.data_groups() == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert layout.expert_groups() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert layout.expert_ranks == 4
    assert Layout("ep", 2, 3).expert_groups() == [[0, 1, 2], [3, 4, 5]]


def test_neighbours_in_the_tensor_dimension_share_their_data():
    places = [Ranks(rank, 6, rank, 6).data_parallel(2) for rank in range(6)]
    assert [(p.rank, p.world_size) for p in places] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]


def test_a_sum_over_ranks_is_given_contiguous_tensors(monkeypatch):
    given = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: given.append(tensor))
    x = torch.arange(6.0).view(2, 3).t().requires_grad_()
    y = sum_over(x, None)
    y.backward(torch.ones(3, 1).expand(3, 2))
    assert len(given) == 2 and all(tensor.is_contiguous() for tensor in given)
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones(3, 2))
