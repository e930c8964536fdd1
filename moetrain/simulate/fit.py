"""Whether a run's state can fit into memory at all, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from moetrain.errors import Problem
from moetrain.models.common.decoder import Decoder
from moetrain.parallel.layouts import Layout
from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.placement.planners import even_sharding
from moetrain.parallel.scheduling import layer_cost
from moetrain.simulate.memory import RankMemory, rank_memory
from moetrain.simulate.model import ModelSizes


def state_memory(model: Decoder, layout: Layout) -> RankMemory:
    """Parameters, gradients, moments and as many copies as the layout allows, on the fullest rank; no activations.

    model: built on the meta device, not sharded.
    """
    sizes = ModelSizes.of(model)
    if not sizes.layers or not layout.places_experts:
        return RankMemory(0, 0, sizes.parameter_bytes * 4 * sum(p.numel() for p in model.parameters()) // (layout.shard * layout.tensor))
    ranks, settings = layout.expert_ranks, layout.fssdp
    owners = [np.bincount(even_sharding(layer.experts.num_experts, ranks), minlength=ranks) for layer in sizes.layers]
    owned = np.stack(owners)
    most = {"owners_only": 0, "everywhere": sizes.num_experts}.get(settings.planner, settings.extra_slots)
    copies = np.minimum(most, sizes.num_experts - owned)
    cluster = Cluster((0,) * ranks)
    costs = [
        layer_cost(layer.experts, sizes.hidden_size, sizes.dtype, settings, mixer_flops=0.0, cluster=cluster) for layer in sizes.layers
    ]
    memory = rank_memory(sizes, owned, copies, costs)
    parts = layout.expert_tensor
    return RankMemory(memory.owned_experts // parts, memory.copies // parts, memory.dense)


def memory_problems(model: Decoder, layout: Layout, available: float | None) -> Iterable[Problem]:
    """What cannot fit into ``available`` bytes per rank (None: not known).

    A problem of extra_slots if the run would fit without copies, else of the layout.
    """
    need = state_memory(model, layout)
    if available is None or need.total <= available:
        return
    gib = lambda size: f"{size / 2**30:.1f} GiB"  # noqa: E731
    if need.total - need.copies <= available and layout.fssdp.planner not in ("owners_only", "everywhere"):
        expected = (
            f"copies of experts take up to {gib(need.copies)} of a rank's {gib(available)}, and {gib(need.total - need.copies)} are needed "
            "without them; fewer slots or parallel.fssdp.rematerialize=true"
        )
        yield Problem("parallel.fssdp.extra_slots", layout.fssdp.extra_slots, expected)
    else:
        needed = f"{gib(need.total)} for parameters, gradients, moments and copies"
        expected = f"a rank needs {needed}, and has {gib(available)}; more ranks or a smaller model"
        yield Problem("parallel", layout.name, expected)


def device_type(choice: str) -> torch.device:
    """The kind of device that ``train.device`` will take here."""
    return torch.device("cpu" if choice == "cpu" or not torch.cuda.is_available() else "cuda")
