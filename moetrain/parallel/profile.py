"""Measured costs of a machine: linear models of its collectives and of expert computation, and the file that keeps them.

Every operation is modelled as t = alpha + beta * n (FSMoE, 2501.10714 section 4.2): t in seconds; n in bytes of the
whole buffer on a rank for collectives (what all_to_all and reduce_scatter take in, what all_gather gives out, what
all_reduce changes; a rank's own part included), in FLOPs for experts. Links within a node and between nodes are
measured apart: first by all nodes at once, then by all ranks of a node at once, so that ranks share what they share
in training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from moetrain.config import dump, load, setting
from moetrain.errors import ConfigError, Problem
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.placement.schedule import TASKS, ChunkCosts
from moetrain.parallel.ranks import Ranks
from moetrain.storage import cache_dir, replace, storage_errors

WARM_UP = 2
"""Runs before the timed ones: they connect ranks, allocate buffers and choose kernels."""


@dataclass(frozen=True)
class LinearCost:
    """t = alpha + beta * n. alpha: seconds. beta: seconds per byte or FLOP. r_squared: share of the squared
    relative error of the best constant that the line removes. samples: (n, t) from which it was fitted."""

    alpha: float
    beta: float
    r_squared: float = 1.0
    samples: tuple[tuple[float, ...], ...] = ()

    def seconds(self, n: float) -> float:
        """Modelled time of n bytes or FLOPs."""
        return self.alpha + self.beta * n


def fit(work: Sequence[float], seconds: Sequence[float]) -> LinearCost:
    """The non-negative alpha and beta with the least squared error *relative* to each time.

    Plain least squares would leave alpha to the noise of the largest sizes, and alpha decides how many chunks are too
    many. Raises ValueError without two different sizes or with times that are not positive.
    """
    n, t = np.asarray(work, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if np.unique(n).size < 2 or not (t > 0).all():
        raise ValueError(f"two different sizes and positive times are needed, got {list(work)} and {list(seconds)}")
    unit = n.max()  # FLOPs and seconds are many orders of magnitude apart
    columns = np.stack([1 / t, n / unit / t], axis=1)
    solution = np.linalg.lstsq(columns, np.ones_like(t))[0]
    if (solution < 0).any():  # with two unknowns the constrained optimum has the negative one at zero
        used = int(solution.argmax())
        solution = np.zeros(2)
        solution[used] = columns[:, used].sum() / np.square(columns[:, used]).sum()
    alpha, beta = float(solution[0]), float(solution[1] / unit)
    constant = (1 / t).sum() / np.square(1 / t).sum()
    unexplained, spread = np.square(1 - (alpha + beta * n) / t).sum(), np.square(1 - constant / t).sum()
    r_squared = float(1 - unexplained / spread) if spread else 1.0
    return LinearCost(alpha, beta, r_squared, tuple(zip(n.tolist(), t.tolist(), strict=True)))


@dataclass(frozen=True)
class Machine:
    """What was measured. device: name of the processor. dtype: in which experts computed. date: UTC, ISO 8601."""

    world_size: int
    ranks_per_node: int
    backend: str
    device: str
    dtype: str
    torch_version: str
    date: str

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    @classmethod
    def here(cls, device: torch.device, world_size: int, ranks_per_node: int, dtype: str) -> Machine:
        """The machine that this process runs on."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(",")) if dist.is_initialized() else {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(world_size, ranks_per_node, backends.get(device.type, "none"), device_name(device), dtype, torch.__version__, now)

    def file(self) -> Path:
        """Where its profile is kept: one file per processor, backend, shape of the machine and dtype."""
        parts = (self.device, self.backend, f"{self.num_nodes}x{self.ranks_per_node}", self.dtype)
        return cache_dir() / "profiles" / f"{'-'.join(re.sub(r'[^a-z0-9]+', '_', part.lower()).strip('_') for part in parts)}.json"


@dataclass(frozen=True)
class MachineProfile:
    """Costs of one machine.

    intra, inter: by name of the collective, for the ranks of a node and for equal ranks of all nodes; empty where
    there is only one of them. experts: forward pass of ``num_experts`` experts on one rank.
    """

    machine: Machine
    intra: dict[str, LinearCost]
    inter: dict[str, LinearCost]
    experts: LinearCost
    num_experts: int

    def cluster(self, node_of: Sequence[int]) -> Cluster:
        """A cluster with these links and processors. node_of: node of each rank, nodes numbered from 0.

        Raises ConfigError if it has links of a kind that was not measured; a kind that it does not have may be missing.
        """
        nodes, machine = max(node_of) + 1, self.machine
        needed = ["intra"] * (len(node_of) > nodes) + ["inter"] * (nodes > 1)
        missing = [kind for kind in needed if not getattr(self, kind)]
        if missing:
            shape = f"{machine.num_nodes} x {machine.ranks_per_node} ranks"
            where = {"intra": "within a node", "inter": "between nodes"}[missing[0]]
            raise ConfigError(f"the profile of {shape} has no links {where}; run `moetrain bench profile` on a machine that has them")
        return Cluster(
            node_of=tuple(node_of),
            intra_bandwidth=_bandwidth(self.intra, machine.ranks_per_node),
            inter_bandwidth=machine.ranks_per_node * _bandwidth(self.inter, machine.num_nodes),
            latency=max((getattr(self, kind)["all_to_all"].alpha for kind in needed), default=0.0),
            flops=1 / self.experts.beta if self.experts.beta else math.inf,
            expert_latency=self.experts.alpha / self.num_experts,
        )

    def chunk_costs(self, work: Mapping[str, float]) -> ChunkCosts:
        """Costs of a layer with this work (bytes, FLOPs) by the names in TASKS: AlltoAll between nodes, AllGather and
        ReduceScatter within one, or whichever link there is. Raises ConfigError if no link was measured."""
        near, far = self.intra or self.inter, self.inter or self.intra
        if not near:
            raise ConfigError(f"the profile of {self.machine.device} has one rank, so no collective was measured")
        costs = [self.experts if task == "experts" else (far if task == "all_to_all" else near)[task] for task in TASKS]
        alpha, beta = (np.array([getattr(cost, name) for cost in costs]) for name in ("alpha", "beta"))
        return ChunkCosts(alpha=alpha, beta=beta, n=np.array([work[task] for task in TASKS], dtype=np.float64))

    def save(self) -> Path:
        """Write the machine's file; returns its path. Raises StorageError."""
        file = self.machine.file()
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(file, json.dumps(dump(self), indent=1))
        return file


def _bandwidth(link: Mapping[str, LinearCost], ranks: int) -> float:
    """Bytes/s that leave a rank in an AlltoAll: its own part of the buffer stays."""
    if not link or not link["all_to_all"].beta:
        return math.inf
    return (ranks - 1) / ranks / link["all_to_all"].beta


def load_profile(file: Path) -> MachineProfile:
    """Read a profile; :meth:`Machine.file` says where that of this machine is. Raises ConfigError if it is missing or damaged."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such profile; `moetrain bench profile` measures this machine") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return load(MachineProfile, plain, path=str(file))


@dataclass(kw_only=True)
class Sweep:
    """Sizes and repetitions of the measurements."""

    min_bytes: int = setting(1 << 12, doc="smallest buffer of a collective, bytes per rank", ge=64)
    max_bytes: int = setting(0, doc="largest buffer of a collective, bytes per rank; 0: 16 MiB, on a GPU 256 MiB", ge=0)
    num_sizes: int = setting(9, doc="sizes per operation, in equal ratios", ge=2)
    repeats: int = setting(7, doc="timed runs per size, of which the median counts", ge=1)
    num_experts: int = setting(4, doc="experts of a rank", ge=1)
    hidden_size: int = setting(0, doc="features of an expert's input; 0: 256, on a GPU 2048", ge=0)
    expert_width: int = setting(0, doc="hidden width of an expert (gated, three matrices); 0: 512, on a GPU 2048", ge=0)
    min_rows: int = setting(4, doc="smallest number of rows per expert", ge=1)
    max_rows: int = setting(0, doc="largest number of rows per expert; 0: 512, on a GPU 8192", ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", doc="dtype of expert computation; auto: float32, on a GPU bfloat16")

    def problems(self, path: str) -> Iterator[Problem]:
        prefix = f"{path}." if path else ""
        for low, high in (("min_bytes", "max_bytes"), ("min_rows", "max_rows")):
            least, most = getattr(self, low), getattr(self, high)
            if most and least >= most:
                yield Problem(prefix + low, least, f"must be < {prefix}{high} ({most})")

    def on(self, device_type: str) -> Sweep:
        """With the sizes and the dtype that suit a kind of device where none are chosen: what keeps it busy for long enough to be
        measured."""
        small = {"max_bytes": 1 << 24, "hidden_size": 256, "expert_width": 512, "max_rows": 512}
        large = {"max_bytes": 1 << 28, "hidden_size": 2048, "expert_width": 2048, "max_rows": 8192}
        chosen: dict[str, Any] = {k: v for k, v in (small if device_type == "cpu" else large).items() if not getattr(self, k)}
        if self.dtype == "auto":
            chosen["dtype"] = "float32" if device_type == "cpu" else "bfloat16"
        return dataclasses.replace(self, **chosen)


def measure(
    sweep: Sweep, device: torch.device, group: dist.ProcessGroup | None = None, ranks_per_node: int | None = None
) -> MachineProfile:
    """Measure this machine on all ranks of a group (None: one process, no collectives); the same result on all ranks.

    ranks_per_node: neighbouring ranks that count as a node; default: those of this machine.
    Raises ConfigError if the nodes are not all of that size, or a smallest size exceeds the largest that suits the device.
    """
    sweep = sweep.on(device.type)
    if problems := list(sweep.problems("")):
        raise ConfigError(problems)
    world = group.size() if group else 1
    size = ranks_per_node or _ranks_per_node(group)
    if world % size:
        raise ConfigError([Problem("ranks_per_node", size, f"must divide the {world} ranks")])
    index = group.rank() if group else 0
    links = []
    for members in ([r for r in range(world) if r // size == index // size], [r for r in range(world) if r % size == index % size]):
        with _subgroup(group, members) as link:
            links.append({} if link is None else measure_collectives(link, sweep, device))
    experts = measure_experts(sweep, device, group)
    plain = [dump(MachineProfile(Machine.here(device, world, size, sweep.dtype), links[0], links[1], experts, sweep.num_experts))]
    if group is not None:  # links of other nodes and ranks were measured at the same time, and differ by noise
        dist.broadcast_object_list(plain, src=dist.get_global_rank(group, 0), group=group)
    return load(MachineProfile, plain[0])


def measure_collectives(group: dist.ProcessGroup, sweep: Sweep, device: torch.device) -> dict[str, LinearCost]:
    """Linear costs of the collectives over a group of at least two ranks, by name. The slowest rank's times count."""
    sizes = _rounded_sizes(sweep.min_bytes, sweep.max_bytes, sweep.num_sizes, multiple=group.size() * torch.float32.itemsize)
    costs = {}
    for name, collective in COLLECTIVES.items():
        times = []
        for size in sizes:
            whole = torch.zeros(size // torch.float32.itemsize, device=device)
            part = torch.zeros(whole.numel() // group.size(), device=device)
            run = collective(whole, part, group)
            dist.barrier(group)
            times.append(median_seconds(run, sweep.repeats, device))
        costs[name] = fit(sizes, slowest(times, device, group))
    return costs


Collective = Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], Callable[[], object]]
"""(buffer of all ranks, buffer of one rank, group) -> one run."""


def _all_to_all(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    received = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(received, whole, group=group)


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    return lambda: gather(whole, part, group=group)


def _reduce_scatter(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13
    return lambda: reduce(part, whole, group=group)


def _all_reduce(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    return lambda: dist.all_reduce(whole, group=group)


COLLECTIVES: dict[str, Collective] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}


@torch.no_grad()
def measure_experts(sweep: Sweep, device: torch.device, group: dist.ProcessGroup | None = None) -> LinearCost:
    """Linear cost of the forward pass of a rank's experts over the FLOPs of all their rows, all ranks of the group at once."""
    dtype = getattr(torch, sweep.dtype)
    experts = FFNExpertsConfig(num_experts=sweep.num_experts, width=sweep.expert_width).build(sweep.hidden_size, dtype=dtype).to(device)
    for parameter in experts.parameters():
        parameter.uniform_(-0.1, 0.1)  # subnormal numbers, as uninitialised memory may hold, are slow on CPUs
    rows = _rounded_sizes(sweep.min_rows, sweep.max_rows, sweep.num_sizes, multiple=1)
    times = []
    for per_expert in rows:
        counts = torch.full((sweep.num_experts,), per_expert, device=device)
        x = torch.rand(per_expert * sweep.num_experts, sweep.hidden_size, dtype=dtype, device=device)
        run = lambda x=x, counts=counts: experts.compute(x, counts, experts.weights())  # noqa: E731
        if group is not None:
            dist.barrier(group)
        times.append(median_seconds(run, sweep.repeats, device))
    flops = [float(per_expert * sweep.num_experts * experts.flops_per_row()) for per_expert in rows]
    return fit(flops, slowest(times, device, group))


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall time of ``run()`` after a warm-up; on a GPU until its work is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(WARM_UP + repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def slowest(times: list[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """Elementwise maximum of all ranks' times."""
    if group is None:
        return times
    tensor = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def _rounded_sizes(low: int, high: int, count: int, *, multiple: int) -> list[int]:
    """Different positive multiples in about equal ratios from low to high, the last at least one multiple above the first."""
    sizes = {max(1, round(size / multiple)) for size in np.geomspace(low, high, count)}
    if len(sizes) == 1:
        sizes.add(max(sizes) + 1)
    return [size * multiple for size in sorted(sizes)]


@contextmanager
def _subgroup(group: dist.ProcessGroup | None, members: list[int]) -> Iterator[dist.ProcessGroup | None]:
    """A process group of these ranks of ``group`` for the time of the block; None if there is only one."""
    if group is None or len(members) == 1:
        yield None
        return
    ranks = [dist.get_global_rank(group, member) for member in members]
    subgroup = dist.new_group(ranks, use_local_synchronization=True)
    try:
        yield subgroup
    finally:
        dist.destroy_process_group(subgroup)


def _ranks_per_node(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group on each machine. Raises ConfigError if machines have different numbers."""
    if group is None:
        return 1
    sizes: list[int] = [0] * group.size()
    dist.all_gather_object(sizes, min(Ranks.detect().local_world_size, group.size()), group=group)
    if len(set(sizes)) > 1:
        raise ConfigError(f"a profile needs the same number of ranks on each machine, found {sorted(set(sizes))}")
    return sizes[0]


def device_name(device: torch.device) -> str:
    """The processor's name as its maker writes it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
