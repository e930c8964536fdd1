"""grouped_linear against a loop over experts, forward and backward, over awkward shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.ops.grouped_linear import grouped_linear
from moetrain.testing import assert_close

COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 9, 2, 5],
    "empty first": [0, 3, 5],
    "empty last": [3, 5, 0],
    "empty between": [2, 0, 0, 7, 0, 1],
    "one expert": [6],
    "one row": [0, 1, 0],
    "no rows": [0, 0, 0],
    "many experts": [0, 1, 2] * 11,
}
SIZES = [(16, 24), (8, 8), (7, 16), (16, 5), (6, 10), (1, 1)]
"""D and F: whole 16-byte units or not, for every dtype."""


def reference(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    parts = [rows @ w.t() for rows, w in zip(x.split(counts), weight, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "out"), SIZES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_equals_a_loop(counts: list[int], width: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, weight, grad = draw(sum(counts), width), draw(len(counts), out, width), draw(sum(counts), out)
    results = []
    for op in (lambda a, b: grouped_linear(a, b, torch.tensor(counts)), lambda a, b: reference(a, b, counts)):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = op(a, b)
        y.backward(grad)
        results.append({"y": y, "x.grad": a.grad, "weight.grad": b.grad})
    assert_close(results[0], results[1], "fast_path", name="grouped_linear")
    assert {name: (t.dtype, t.shape) for name, t in results[0].items()} == {name: (t.dtype, t.shape) for name, t in results[1].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_expert_without_rows_gets_a_zero_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 8, 8, dtype=dtype, requires_grad=True)
    grouped_linear(torch.randn(5, 8, dtype=dtype), weight, torch.tensor([2, 0, 3])).sum().backward()
    assert weight.grad is not None and bool((weight.grad[1] == 0).all()) and bool((weight.grad[[0, 2]] != 0).any())


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, torch.tensor([3, 0, 4, 0])), (x, weight))


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_only_wanted_gradients_are_computed(needs: str) -> None:
    x, weight = torch.randn(5, 8, requires_grad=needs == "x"), torch.randn(2, 4, 8, requires_grad=needs == "weight")
    grouped_linear(x, weight, torch.tensor([2, 3])).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (needs == "x", needs == "weight")


@pytest.mark.parametrize("width", [8, 7])
def test_strided_inputs(width: int) -> None:
    """Columns of a wider matrix, a transposed weight, an expanded gradient."""
    x = torch.randn(6, width + 3)[:, :width]
    weight = torch.randn(2, width, 8).transpose(1, 2)
    counts = torch.tensor([2, 4])
    assert_close(grouped_linear(x, weight, counts), reference(x, weight, [2, 4]), "fast_path")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_with_an_expanded_gradient(dtype):
    x = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    weight = torch.ones(3, 4, 8, dtype=dtype, requires_grad=True)
    grouped_linear(x, weight, torch.zeros(3, dtype=torch.long)).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))
