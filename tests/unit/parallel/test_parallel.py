"""Index arithmetic of expert parallelism, rank detection, layouts."""

import pytest
import torch

from moetrain.parallel.executor import regroup
from moetrain.parallel.layouts import AutoConfig, EPConfig, FSDPConfig, Layout, SingleConfig
from moetrain.parallel.ranks import Ranks


@pytest.mark.parametrize("counts", [[[2, 0, 1], [1, 3, 0]], [[0, 0], [0, 0]], [[5]], [[0, 4], [0, 0], [1, 0]]])
def test_regroup_is_a_permutation_by_expert_and_back(counts):
    counts = torch.tensor(counts)
    by_expert, by_source = regroup(counts)
    rows = torch.tensor([(s, e) for s in range(counts.shape[0]) for e in range(counts.shape[1]) for _ in range(counts[s, e])]).view(-1, 2)
    grouped = rows[by_expert]
    assert grouped[:, 1].tolist() == sorted(rows[:, 1].tolist())
    assert torch.equal(grouped[by_source], rows)


def test_ranks_from_torchrun():
    assert Ranks.detect({}) == Ranks(0, 1, 0, 1)
    found = Ranks.detect({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert found == Ranks(5, 8, 1, 4) and not found.is_main


def test_layouts():
    assert AutoConfig().resolve(1) == Layout("single", 1, 1)
    assert AutoConfig().resolve(4) == Layout("ep", 1, 4)
    assert FSDPConfig(replicate=2).resolve(4) == Layout("fsdp", 2, 2)
    assert not list(EPConfig().check("parallel", world_size=3, num_experts=2))
    assert [p.field for p in EPConfig(replicate=2, tensor=2).check("parallel", world_size=3, num_experts=8)] == [
        "parallel.tensor",
        "parallel.replicate",
    ]
    assert [p.field for p in SingleConfig().check("parallel", world_size=2, num_experts=8)] == ["parallel"]
