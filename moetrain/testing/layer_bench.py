"""Speed of one MoE feed-forward layer, forward and backward, against the bare matrix products that it cannot do without.

The layer: linear router, softmax, the K best renormalised, SwiGLU experts, no token dropped; from x to dx and the gradients
of all weights. A case's inputs make the router choose a known routing, so that every implementation does the same work.
Imports torch alone: implementations that live in environments of their own are measured by the same code.

Letters: T tokens, D model, F expert hidden, E experts, K choices per token, R = T K rows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from moetrain.testing.tolerances import TOLERANCES

PRECISIONS = ("float32", "bfloat16", "mixed")
"""Of weights, rows and products. mixed: float32 weights and weight gradients, everything else bfloat16."""

RESULTS = ("y", "x", "router", "gate", "up", "down")
"""What is compared: the output, and the gradients of input and weights."""


@dataclass(frozen=True)
class LayerCase:
    """One measurement. routing: ``balanced``, or ``zipf:A``, experts drawn with probabilities that fall as rank^-A."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    precision: str = "float32"
    routing: str = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.routing != "balanced" and not self.routing.startswith("zipf:"):
            raise ValueError(f"routing {self.routing!r} is neither balanced nor zipf:A")
        if self.routing != "balanced" and not math.isfinite(float(self.routing.removeprefix("zipf:"))):  # ValueError if no number
            raise ValueError(f"routing {self.routing!r} has no finite exponent")
        if not self.top_k < self.experts <= self.hidden:
            raise ValueError(f"{self.top_k} choices of {self.experts} experts by {self.hidden} features: must be K < E <= D")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(T, D, F, E, K)"""
        return self.tokens, self.hidden, self.width, self.experts, self.top_k

    @property
    def dtype(self) -> torch.dtype:
        """Of rows and products."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights and their gradients."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


# Inputs and the expected results


def choose_experts(case: LayerCase) -> Tensor:
    """Expert ids [T, K] int64, distinct for each token. Which expert is popular is random; balanced loads differ by one row at most."""
    generator = torch.Generator().manual_seed(case.seed)
    names = torch.randperm(case.experts, generator=generator)
    if case.routing == "balanced":
        slots = torch.arange(case.tokens * case.top_k).view(case.tokens, case.top_k) % case.experts
        return names[slots[torch.randperm(case.tokens, generator=generator)]]
    exponent = float(case.routing.removeprefix("zipf:"))
    uniform = torch.rand(case.tokens, case.experts, generator=generator, dtype=torch.float64)
    # the best of log-probability plus Gumbel noise are draws without replacement
    logits = -exponent * torch.arange(1, case.experts + 1, dtype=torch.float64).log() - (-uniform.log()).log()
    return names[logits.topk(case.top_k, dim=1).indices]


def make_inputs(case: LayerCase, device: torch.device | None = None) -> dict[str, Tensor]:
    """x, dy [T, D], router [E, D], gate, up [E, F, D], down [E, D, F], all bfloat16: every precision gets the same numbers.

    The first E features of x say which experts the token wants, and the router reads little else: no rounding changes a choice.
    device: where they are made, None: the CPU; devices draw different numbers. Raises AssertionError if the router chooses otherwise.
    """
    tokens, hidden, width, experts, _ = case.shape
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(case.seed + 1)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).bfloat16()

    chosen = choose_experts(case).to(device)
    x = normal(tokens, hidden)
    wish = torch.rand(tokens, experts, generator=generator, device=device) + 0.5
    x[:, :experts] = wish.where(torch.zeros_like(wish, dtype=torch.bool).scatter(1, chosen, True), -wish)
    router = normal(experts, hidden, std=0.005 * min(1.0, (512 / hidden) ** 0.5))  # its share of a logit does not grow with D
    router[:, :experts] += 2 * torch.eye(experts, dtype=torch.bfloat16, device=device)
    logits = x.float() @ router.float().t()
    assert torch.equal(logits.topk(case.top_k, dim=1).indices.sort(1).values, chosen.sort(1).values)
    return {
        "x": x,
        "dy": normal(tokens, hidden),
        "router": router,
        "gate": normal(experts, width, hidden, std=hidden**-0.5),
        "up": normal(experts, width, hidden, std=hidden**-0.5),
        "down": normal(experts, hidden, width, std=width**-0.5),
    }


def cast_inputs(inputs: Mapping[str, Tensor], case: LayerCase, device: torch.device) -> dict[str, Tensor]:
    """The inputs in the dtypes of the case's precision."""
    return {name: t.to(device, case.dtype if name in ("x", "dy") else case.weight_dtype) for name, t in inputs.items()}


def expected_results(inputs: Mapping[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """RESULTS in float64, expert by expert."""
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items()}
    probabilities = torch.softmax(leaves["x"] @ leaves["router"].t(), dim=1)
    weight, chosen = probabilities.topk(top_k, dim=1)
    weight = weight / weight.sum(1, keepdim=True)
    y = torch.zeros_like(leaves["x"])
    for expert, (gate, up, down) in enumerate(zip(*(leaves[name].unbind(0) for name in ("gate", "up", "down")), strict=True)):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        rows = leaves["x"][token]
        y = y.index_add(0, token, weight[token, choice, None] * ((F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()))
    gradients = torch.autograd.grad(y, [leaves[name] for name in RESULTS[1:]], leaves["dy"].detach())
    return {"y": y.detach(), **dict(zip(RESULTS[1:], gradients, strict=True))}


def rank_share(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one rank of expert parallelism has of inputs or results: its run of tokens, its run of experts, the whole router."""
    return {name: t if name == "router" else t.chunk(ranks)[rank] for name, t in tensors.items()}


def worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: LayerCase) -> tuple[float, str]:
    """Largest error of an entry over the largest entry of its tensor, in units of what the precision allows; and of which tensor."""
    tolerance = TOLERANCES["fast_path"][case.dtype]
    errors = {}
    for name in RESULTS:
        right = expected[name].to(found[name].device).double()
        error = float((found[name].double() - right).abs().max() / right.abs().max() / tolerance)
        errors[name] = math.inf if math.isnan(error) else error
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


# What is measured


class Unsupported(Exception):
    """An implementation cannot run a case; the message says why."""


class Layer(Protocol):
    """An implementation with a case's weights and input. step() is timed; results() are RESULTS of the last one."""

    def prepare(self) -> None: ...

    def step(self) -> None: ...

    def results(self) -> dict[str, Tensor]: ...


class AutogradLayer:
    """A module that maps x to y.

    gradients: called after a step, the weight gradients by their names in RESULTS. low_precision: the module computes with
    copies of its parameters in x's dtype, made in each step, as fully sharded training with mixed precision does.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        dy: Tensor,
        gradients: Callable[[], Mapping[str, Tensor]],
        *,
        low_precision: bool = False,
    ) -> None:
        self.module, self.gradients, self.low_precision = module, gradients, low_precision
        self.x, self.dy = x.clone().requires_grad_(), dy
        self.y = dy

    def prepare(self) -> None:
        """Forget the last step's gradients."""
        self.y, self.x.grad = self.dy, None
        for parameter in self.module.parameters():
            parameter.grad = None

    def forward(self) -> None:
        """Forward alone, ready for backward."""
        if self.low_precision:
            copies = {name: parameter.to(self.x.dtype) for name, parameter in self.module.named_parameters()}
            self.y = functional_call(self.module, copies, (self.x,))
        else:
            self.y = self.module(self.x)

    def step(self) -> None:
        """Forward and backward."""
        self.forward()
        self.y.backward(self.dy)

    def results(self) -> dict[str, Tensor]:
        """Of the last step."""
        assert self.x.grad is not None
        return {"y": self.y.detach(), "x": self.x.grad, **self.gradients()}


class OwnLayer(nn.Module):
    """moetrain's MoE layer as models use it in training. Inputs: as :func:`cast_inputs` gives them; if they have some of the experts
    only, the layer is one rank's under expert parallelism over the default process group."""

    def __init__(self, case: LayerCase, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        from moetrain.moe.layer import MoEParts  # its parts register themselves
        from moetrain.registry import lookup

        parts = MoEParts(
            router=lookup("router", "topk")(top_k=case.top_k, renormalise=True),
            experts=lookup("experts", "ffn")(num_experts=case.experts, width=case.width),
            capacity=lookup("capacity", "none")(),
        )
        with inputs["x"].device:
            self.moe = parts.build(case.hidden, dtype=case.weight_dtype)
        if len(inputs["gate"]) < case.experts:
            self.spread(case, inputs["x"].device)
        router, w_in, w_out = self.weights()
        with torch.no_grad():
            router.copy_(inputs["router"])
            w_in.copy_(torch.cat([inputs["gate"], inputs["up"]], dim=1))
            w_out.copy_(inputs["down"])

    def spread(self, case: LayerCase, device: torch.device) -> None:
        """Leave this rank its experts; tokens travel."""
        from moetrain.parallel.executor import PlacedExecutor
        from moetrain.parallel.parallelize import connect
        from moetrain.parallel.placement.dispatch import split_even
        from moetrain.parallel.placement.planners import even_sharding
        from moetrain.parallel.ranks import Ranks
        from moetrain.registry import lookup

        ranks = Ranks.detect()
        links = connect(lookup("parallel", "ep")().resolve(ranks.world_size), ranks, device)
        owner = even_sharding(case.experts, ranks.world_size)
        self.moe.experts.hold([expert for expert in range(case.experts) if owner[expert] == ranks.rank])
        self.moe.executor = PlacedExecutor(owner, links, device, dtype=case.dtype, split=split_even)

    def weights(self) -> list[nn.Parameter]:
        """Router [E, D], gate above up [E, 2F, D], down [E, D, F]."""
        return [self.moe.get_parameter(name) for name in ("router.weight", "experts.w_in", "experts.w_out")]

    def forward(self, x: Tensor) -> Tensor:
        from moetrain.moe.context import ForwardContext

        return self.moe(x, ForwardContext(batch_size=1, seq_len=len(x), training=True).at("layer"))

    def gradients(self) -> dict[str, Tensor]:
        """Weight gradients by their names in RESULTS."""
        router, w_in, w_out = (weight.grad for weight in self.weights())
        assert router is not None and w_in is not None and w_out is not None
        gate, up = w_in.chunk(2, dim=1)
        return {"router": router, "gate": gate, "up": up, "down": w_out}

    @classmethod
    def ready(cls, case: LayerCase, inputs: Mapping[str, Tensor]) -> AutogradLayer:
        """To be measured."""
        module = cls(case, inputs)
        return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients)


class DenseLimit:
    """The layer's matrix products and nothing else: for each expert three forward and six backward, on equally many rows, into
    memory that is reused. ranks: its share of the experts, with R rows all the same, is one rank's of expert parallelism."""

    def __init__(self, case: LayerCase, device: torch.device, ranks: int = 1) -> None:
        tokens, hidden, width, experts, top_k = case.shape
        rows, experts = tokens * top_k, experts // ranks

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=case.dtype, device=device)

        ends = [rows * (e + 1) // experts for e in range(experts)]
        self.slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.x, self.dy = normal(rows, hidden), normal(rows, hidden)
        self.h, self.a, self.b = normal(rows, width), normal(rows, width), normal(rows, width)
        self.gate, self.up, self.down = normal(experts, width, hidden), normal(experts, width, hidden), normal(experts, hidden, width)
        self.d_gate, self.d_up, self.d_down = (torch.empty_like(w) for w in (self.gate, self.up, self.down))
        self.out_wide, self.out_rows = torch.empty_like(self.h), torch.empty_like(self.x)

    def forward(self) -> None:
        """The products of a forward."""
        for e, s in enumerate(self.slices):
            self._forward(e, s)

    def _forward(self, e: int, s: slice) -> None:
        x, h, wide, rows = (t[s] for t in (self.x, self.h, self.out_wide, self.out_rows))
        torch.mm(x, self.gate[e].t(), out=wide)
        torch.mm(x, self.up[e].t(), out=wide)
        torch.mm(h, self.down[e].t(), out=rows)

    def step(self) -> None:
        """All products of one step."""
        for e, s in enumerate(self.slices):
            self._forward(e, s)
            x, dy, h, a, b, wide, rows = (t[s] for t in (self.x, self.dy, self.h, self.a, self.b, self.out_wide, self.out_rows))
            torch.mm(dy, self.down[e], out=wide)
            torch.mm(dy.t(), h, out=self.d_down[e])
            torch.mm(a.t(), x, out=self.d_gate[e])
            torch.mm(b.t(), x, out=self.d_up[e])
            torch.mm(a, self.gate[e], out=rows)
            torch.mm(b, self.up[e], out=rows)


class CopyLimit:
    """The rows that the layer must move: R gathered and R summed into T, forward and again backward, at the rate of a plain copy."""

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        rows = case.tokens * case.top_k
        # read and written: 2 R to gather, R + T to sum, twice; a copied entry is read once and written once
        entries = 2 * (3 * rows + case.tokens) * case.hidden // 2
        self.source = torch.ones(entries, dtype=case.dtype, device=device)
        self.target = torch.empty_like(self.source)

    def step(self) -> None:
        """One copy of as many bytes."""
        self.target.copy_(self.source)


# Measuring


class Seconds(NamedTuple):
    """Of one step: elapsed, and of the process on all its processors."""

    wall: float
    cpu: float


def time_step(step: Callable[[], None], device: torch.device) -> Seconds:
    """Of one call."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def peak_bytes(layer: Layer, device: torch.device) -> int:
    """Most bytes that torch's allocator had handed out within a step, above what it had before.

    Gradients and output are among them; scratch memory of the matrix library is not.
    """
    layer.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    from moetrain.testing.memory import allocations  # imports most of the library

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer.step()
    return allocations(profiler)[0]


class Pair(NamedTuple):
    """One round of a system and the dense limit just before it."""

    own: Seconds
    limit: Seconds

    @property
    def wall(self) -> float:
        """Times the limit."""
        return self.own.wall / self.limit.wall

    @property
    def cpu(self) -> float:
        """Times the limit."""
        return self.own.cpu / self.limit.cpu


def interleave(
    systems: Mapping[str, Callable[[], Seconds]], limit: Callable[[], Seconds], rounds: int, *, slow: float = math.inf
) -> dict[str, list[Pair]]:
    """Pairs of each system, in rounds over all of them that start with another one each time.

    A system that takes more than ``slow`` times the limit is left out after three rounds.
    """
    names = list(systems)
    pairs: dict[str, list[Pair]] = {name: [] for name in names}
    for index in range(rounds):
        start = index % max(1, len(names))
        for name in names[start:] + names[:start]:
            if index >= 3 and statistics.median(pair.wall for pair in pairs[name]) > slow:
                continue
            before = limit()
            pairs[name].append(Pair(systems[name](), before))
    return pairs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (minimum-maximum)``"""
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(statistics.median(values), min(values), max(values), d=digits)


def shared_rounds(own: Sequence[Pair], other: Sequence[Pair]) -> Iterator[tuple[Pair, Pair]]:
    """Rounds that both systems were measured in: a slow one has only the first."""
    return zip(own, other, strict=False)
