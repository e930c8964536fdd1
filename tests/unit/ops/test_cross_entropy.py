"""linear_cross_entropy against logits in memory and torch's own cross-entropy in float64, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops.cross_entropy import linear_cross_entropy
from moetrain.testing import assert_close

IGNORE = -100
SHAPES = {"even": (8, 4, 16, 4), "one token": (1, 5, 7, 3), "rest": (11, 3, 6, 4), "one chunk": (5, 8, 9, None), "one output": (4, 3, 1, 2)}
"""T, D, V, tokens of a chunk."""


def inputs(tokens: int, width: int, outputs: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(outputs, (tokens,), generator=generator)
    targets[2::3] = IGNORE
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    squared = torch.where(targets != IGNORE, torch.logsumexp(logits, dim=1).square(), 0.0).sum()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), z_weight * squared


def results(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float, chunk: int | None, factor: float = 1.0) -> dict[str, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll, z = linear_cross_entropy(h, w, targets, ignore=IGNORE, z_weight=z_weight, chunk=chunk)
    (factor * (nll + z)).backward()
    assert h.grad is not None and w.grad is not None
    return {"nll": nll.detach(), "z": z.detach(), "hidden.grad": h.grad, "weight.grad": w.grad}


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float, factor: float = 1.0) -> dict[str, Tensor]:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    nll, z = reference(h, w, targets, z_weight)
    (factor * (nll + z)).backward()
    assert h.grad is not None and w.grad is not None
    return {"nll": nll.detach(), "z": z.detach(), "hidden.grad": h.grad, "weight.grad": w.grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_weight", [0.0, 0.3, -0.2])
@pytest.mark.parametrize(("tokens", "width", "outputs", "chunk"), SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_logits_in_memory(tokens: int, width: int, outputs: int, chunk: int | None, z_weight: float, dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(tokens, width, outputs)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    ours = results(hidden, weight, targets, z_weight, chunk, factor=0.7)
    in_dtype = {name: value.to(dtype) for name, value in ours.items()}  # sums are wider, of products that were rounded to dtype
    assert_close(in_dtype, expected(hidden, weight, targets, z_weight, factor=0.7), "fast_path")
    assert ours["nll"].dtype == torch.promote_types(dtype, torch.float32) and ours["weight.grad"].dtype == dtype


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(9, 4, 7, scale=300.0)
    ours = results(hidden.float(), weight.float(), targets, 1e-4, 4)
    assert all(bool(value.isfinite().all()) for value in ours.values())
    assert_close(ours["hidden.grad"], expected(hidden.float(), weight.float(), targets, 1e-4)["hidden.grad"], "fast_path")


def test_narrow_activations_with_wide_weights() -> None:
    """float32 masters under bfloat16: the gradient of the weight is float32 and does not pass through bfloat16."""
    hidden, weight, targets = inputs(9, 4, 7)
    ours = results(hidden.bfloat16(), weight.float(), targets, 0.0, 4)
    assert ours["weight.grad"].dtype == torch.float32 and ours["hidden.grad"].dtype == torch.bfloat16
    wanted = expected(hidden.bfloat16(), weight.bfloat16(), targets, 0.0)
    for name in ("nll", "hidden.grad", "weight.grad"):
        assert_close(ours[name].bfloat16(), wanted[name], "fast_path", name=name)


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_predict(tokens: int) -> None:
    hidden, weight, _ = inputs(tokens, 4, 7)
    ours = results(hidden, weight, torch.full((tokens,), IGNORE), 0.1, None)
    assert all(not bool(value.any()) for value in ours.values())


def test_backward_twice_adds_up() -> None:
    hidden, weight, targets = inputs(9, 4, 7)
    h = hidden.clone().requires_grad_()
    nll, _ = linear_cross_entropy(h, weight, targets, ignore=IGNORE, chunk=4)
    nll.backward(retain_graph=True)
    once = h.grad.clone()  # type: ignore[union-attr]
    nll.backward()
    assert torch.equal(h.grad, 2 * once)  # type: ignore[arg-type]


@dataclass
class Part:
    """Outputs ``first`` to ``last`` of all, whose other values are known beforehand."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    first: int
    largest: int
    seen: int = 0

    def combine(self, log_partition: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(self.seen, self.seen + log_partition.numel())
        self.seen += log_partition.numel()
        logits = F.linear(self.hidden[rows], self.weight)
        return torch.logsumexp(logits, dim=1), logits.gather(1, self.targets[rows].clamp_min(0)[:, None])[:, 0]

    def sum(self, values: Tensor) -> Tensor:
        return 2 * values


def test_parts_of_the_outputs_give_their_parts_of_the_gradients() -> None:
    hidden, weight, targets = inputs(9, 4, 7)
    parts = []
    for first, last in ((0, 4), (4, 7)):
        h, w = hidden.clone().requires_grad_(), weight[first:last].clone().requires_grad_()
        part = Part(hidden, weight, targets, first, 4)
        nll, z = linear_cross_entropy(h, w, targets, ignore=IGNORE, z_weight=0.1, part=part, chunk=4)
        (nll / 2).backward()  # half of the loss on each of two ranks
        parts.append((nll.detach(), z, h.grad, w.grad))
    whole = expected(hidden, weight, targets, 0.1)
    for nll, z, _, _ in parts:
        assert_close({"nll": nll, "z": z}, {"nll": whole["nll"], "z": whole["z"]}, "fast_path")
    assert_close(parts[0][2] + parts[1][2], whole["hidden.grad"], "fast_path")
    assert_close(torch.cat([parts[0][3], parts[1][3]]), whole["weight.grad"], "fast_path")


class Largest(TorchDispatchMode):
    """Most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_logits_of_all_tokens_are_never_in_memory() -> None:
    tokens, width, outputs = 2048, 4, 64
    hidden, weight, targets = inputs(tokens, width, outputs)
    with Largest() as ours:
        results(hidden, weight, targets, 0.1, None)
    with Largest() as theirs:
        expected(hidden, weight, targets, 0.1)
    assert theirs.numel == tokens * outputs
    assert ours.numel == max(256 * outputs, tokens * width)


def test_without_gradient_only_values_are_computed() -> None:
    hidden, weight, targets = inputs(9, 4, 7)
    with torch.no_grad():
        nll, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets, ignore=IGNORE)
    assert not nll.requires_grad
    assert_close(nll, reference(hidden, weight, targets, 0.0)[0], "fast_path")
