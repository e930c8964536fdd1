"""Speed of each hot operation of an MoE model, forward and backward, against its slow twin: the same by plain torch and autograd.

Letters: T tokens, D model, F expert hidden, E experts, K choices per token, V vocabulary, N = T K rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.ops import expert_ffn
from moetrain.ops.cross_entropy import linear_cross_entropy
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.grouped_linear import grouped_linear
from moetrain.ops.permute import Rows, combine_rows, gather_rows
from moetrain.ops.rms_norm import rms_norm
from moetrain.ops.rotary import rotate
from moetrain.ops.sort import sort_by_expert
from moetrain.testing.layer_bench import time_step
from moetrain.testing.tolerances import TOLERANCES, max_error

EPS = 1e-6
HEAD_DIM = 64

Op = Callable[..., tuple[Tensor, ...]]
"""From leaves by name to outputs, of which the first carries the gradient if it has any."""


@dataclass(kw_only=True)
class OpSizes:
    """Sizes that all operations are measured at."""

    tokens: int = setting(4096, doc="T, tokens", ge=1)
    hidden: int = setting(512, doc="D, model width", ge=1)
    width: int = setting(256, doc="F, hidden width of one expert", ge=1)
    experts: int = setting(64, doc="E, experts", ge=1)
    top_k: int = setting(8, doc="K, experts per token", ge=1)
    vocab_size: int = setting(8192, doc="V, outputs of the cross-entropy", ge=2)
    dtype: Literal["float32", "bfloat16", "float64"] = setting("float32", doc="of rows and weights; routing has at least float32")

    def problems(self, path: str) -> Iterator[Problem]:
        prefix = f"{path}." if path else ""
        if self.top_k > self.experts:
            yield Problem(f"{prefix}top_k", self.top_k, f"must be <= {prefix}experts ({self.experts})")
        if self.hidden % 2:
            yield Problem(f"{prefix}hidden", self.hidden, "must be even: rotary embedding turns pairs")


@dataclass(frozen=True)
class Operation:
    """An operation with its inputs. leaves: inputs with a gradient. again: those that the backward cannot do without.
    indices: what else each pass must read. flops: of the products of forward and backward."""

    name: str
    fast: Op
    slow: Op
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    again: Sequence[str] = ()
    indices: Sequence[Tensor] = ()
    flops: int = 0

    def run(self, op: Op, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients, computed in another dtype if one is given."""
        leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in self.leaves.items()}
        outputs = op(**leaves)
        results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        if leaves:
            gradients = torch.autograd.grad(outputs[0], list(leaves.values()), output_gradient(outputs[0]))
            results |= {f"{name}.grad": t for name, t in zip(leaves, gradients, strict=True)}
        return results

    def error(self) -> float:
        """Largest error of the fast path against the slow twin in float64, in units of what the inputs' dtype allows."""
        allowed = max((TOLERANCES["fast_path"][t.dtype] for t in self.leaves.values()), default=0.0)
        found, expected = self.run(self.fast), self.run(self.slow, torch.float64)
        errors = [
            max_error(found[name], t) / allowed if t.is_floating_point() else 0.0 if torch.equal(found[name], t) else math.inf
            for name, t in expected.items()
        ]
        return max(errors)

    def least_bytes(self) -> int:
        """Bytes that forward and backward must move: each operand read and each result written once per pass."""
        results = self.run(self.fast)
        outputs = [t for name, t in results.items() if name.startswith("output")]
        gradients = [t for name, t in results.items() if name.endswith(".grad")]
        moved = [*self.leaves.values(), *self.indices, *outputs]
        if gradients:
            moved += [outputs[0], *(self.leaves[name] for name in self.again), *self.indices, *gradients]
        return sum(t.numel() * t.element_size() for t in moved)


def output_gradient(output: Tensor) -> Tensor:
    """The same numbers for the same shape, whatever the dtype and device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output)


def make_operations(sizes: OpSizes, device: torch.device) -> list[Operation]:
    """All operations, on one routing of each token to K random experts."""
    tokens, hidden, width, experts, top_k = sizes.tokens, sizes.hidden, sizes.width, sizes.experts, sizes.top_k
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    # a permutation of even steps for each token: no rounding makes a tie
    logits = torch.rand(tokens, experts, generator=generator).argsort(dim=1).to(device, wide) * (6 / experts)
    expert = logits.topk(top_k, dim=1).indices.flatten()
    order, counts, place = sort_by_expert(expert, experts)
    rows = Rows(order // top_k, place, None, tokens)
    numbers = tokens * top_k

    x, y = normal(tokens, hidden), normal(numbers, hidden)
    w_in, w_out = normal(experts, 2 * width, hidden, std=hidden**-0.5), normal(experts, hidden, width, std=width**-0.5)
    weight = torch.rand(numbers, generator=generator).to(device, wide)

    def block(op: Callable[..., Tensor], x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        sets = [ExpertSet((w_in, w_out), counts)]
        return (op(x, sets, rows=rows, weight=weight, activation="silu", gated=True),)

    head, targets = normal(sizes.vocab_size, hidden, std=hidden**-0.5), torch.randint(sizes.vocab_size, (tokens,), generator=generator)
    targets = targets.to(device)
    head_dim = HEAD_DIM if hidden % HEAD_DIM == 0 else hidden
    angle = 6 * torch.rand(tokens, head_dim // 2, generator=generator).to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    router = TopKRouter(TopKRouterConfig(top_k=top_k, renormalise=True), hidden, experts, dtype=dtype)
    context = ForwardContext(batch_size=1, seq_len=tokens, training=True).at("layer")

    def route(logits: Tensor) -> tuple[Tensor, ...]:
        routing = router.route(logits, context)
        return routing.weight, routing.expert

    product = 2 * numbers * hidden * width
    return [
        Operation("sort_by_expert", lambda: sort_by_expert(expert, experts), lambda: sort_plainly(expert, experts), indices=[expert]),
        Operation("gather_rows", lambda x: (gather_rows(x, rows),), lambda x: (x[rows.token],), {"x": x}, indices=[rows.token]),
        Operation(
            "combine_rows",
            lambda y, weight: (combine_rows(y, weight, rows),),
            lambda y, weight: (combine_plainly(y, weight, rows),),
            {"y": y, "weight": weight},
            again=["y", "weight"],
            indices=[rows.token],
        ),
        Operation(
            "grouped_linear",
            lambda x, weight: (grouped_linear(x, weight, counts),),
            lambda x, weight: (torch.cat([a @ w.t() for a, w in zip(x.split(counts.tolist()), weight.unbind(), strict=True)]),),
            {"x": y, "weight": w_in},
            again=["x", "weight"],
            flops=3 * 2 * product,
        ),
        Operation(
            "expert_ffn",
            partial(block, expert_ffn.expert_ffn),
            partial(block, expert_ffn.reference),
            {"x": x, "w_in": w_in, "w_out": w_out, "weight": weight},
            again=["x", "w_in", "w_out", "weight"],
            indices=[rows.token],
            flops=3 * 3 * product,
        ),
        Operation(
            "cross_entropy",
            lambda x, weight: linear_cross_entropy(x, weight, targets, ignore=-1)[:1],
            lambda x, weight: (F.cross_entropy((x @ weight.t()).to(torch.promote_types(x.dtype, wide)), targets, reduction="sum"),),
            {"x": x, "weight": head},
            indices=[targets],
            flops=3 * 2 * tokens * hidden * sizes.vocab_size,
        ),
        Operation(
            "rms_norm",
            lambda x, weight: (rms_norm(x, weight, EPS),),
            lambda x, weight: (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight,),
            {"x": x, "weight": normal(hidden)},
            again=["x", "weight"],
        ),
        Operation(
            "rotary",
            lambda x: (rotate(x, cos, sin),),
            lambda x: (rotate_plainly(x, cos.to(x), sin.to(x)),),
            {"x": normal(hidden // head_dim, tokens, head_dim)},
            indices=[cos, sin],
        ),
        Operation("router", route, lambda logits: route_plainly(logits, top_k), {"logits": logits}),
    ]


# Slow twins


def sort_plainly(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sort_by_expert`."""
    order = expert.argsort(stable=True)
    return order, torch.bincount(expert, minlength=num_experts), order.argsort()


def combine_plainly(y: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """As :func:`combine_rows`."""
    total = weight.new_zeros(rows.num_tokens, y.shape[1])
    return total.index_add(0, rows.token, weight[:, None] * y).to(y.dtype)


def rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As :func:`rotate`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def route_plainly(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Renormalised weights and expert ids, both [N], of the K best of a softmax; all E are sorted."""
    powers = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    ordered, index = (powers / powers.sum(dim=1, keepdim=True)).sort(dim=1, descending=True)
    best = ordered[:, :top_k]
    return (best / best.sum(dim=1, keepdim=True)).flatten(), index[:, :top_k].flatten()


# Measuring


class Passes(NamedTuple):
    """Seconds of one round; backward 0 if there is none."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class OpSpeed:
    """Rounds of one operation. bytes: moved at least; error: see :meth:`Operation.error`."""

    name: str
    fast: list[Passes]
    slow: list[Passes]
    bytes: int
    flops: int
    error: float


def time_passes(operation: Operation, op: Op, device: torch.device) -> Passes:
    """One forward and one backward."""
    leaves = {name: t.detach().requires_grad_() for name, t in operation.leaves.items()}
    outputs: list[Tensor] = []
    forward = time_step(lambda: outputs.extend(op(**leaves)), device).wall
    if not leaves:
        return Passes(forward, 0.0)
    results: list[Any] = []  # kept, so that their memory is not freed within the time
    gradient = output_gradient(outputs[0])
    backward = time_step(lambda: results.extend(torch.autograd.grad(outputs[0], list(leaves.values()), gradient)), device).wall
    return Passes(forward, backward)


def measure(operation: Operation, rounds: int, device: torch.device) -> OpSpeed:
    """Compare, warm up, then time fast path and slow twin in turns, each first in every other round."""
    error = operation.error()
    times: dict[Op, list[Passes]] = {operation.fast: [], operation.slow: []}
    pair = list(times)
    for index in range(-1, rounds):
        for op in pair if index % 2 else pair[::-1]:
            passes = time_passes(operation, op, device)
            if index >= 0:
                times[op].append(passes)
    return OpSpeed(operation.name, times[operation.fast], times[operation.slow], operation.least_bytes(), operation.flops, error)
