"""Moving rows: gather and weighted combine against plain indexing, with and without the dense [T, K] map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.ops.permute import combine_rows, gather_rows
from moetrain.testing import assert_close

T, K, D = 7, 3, 5


def permutation(seed: int = 0) -> tuple[Tensor, Tensor]:
    """token [T * K] of rows in a random order, and place_TK [T, K], the rows of each token."""
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(seed))
    return order // K, order.argsort().view(T, K)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fixed", [True, False])
def test_gather(fixed: bool, dtype: torch.dtype) -> None:
    token, place = permutation()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(T * K, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = gather_rows(x, token, place if fixed else None)
    assert torch.equal(rows, x[token])
    rows.backward(grad)
    expected = torch.zeros(T, D, dtype=torch.float64).index_add(0, token, grad.double())
    assert_close(x.grad, expected.to(dtype), "fast_path")


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    ("rows", "weights"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_combine(fixed: bool, rows: torch.dtype, weights: torch.dtype) -> None:
    token, place = permutation()
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(T * K, D, generator=generator).to(rows).requires_grad_()
    weight = torch.rand(T * K, generator=generator).to(weights).requires_grad_()
    grad = torch.randn(T, D, generator=generator).to(weights)
    out = combine_rows(y, weight, token, T, place if fixed else None)
    assert out.dtype == weights
    out.backward(grad)

    y2, weight2 = y.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    expected = torch.zeros(T, D, dtype=weights).index_add(0, token, y2.to(weights) * weight2[:, None])
    expected.backward(grad)
    assert_close(out, expected, "fast_path", name="out")
    assert_close(y.grad, y2.grad, "fast_path", name="y.grad")
    assert_close(weight.grad, weight2.grad, "fast_path", name="weight.grad")


def test_tokens_without_rows_are_zero_and_there_may_be_no_rows_at_all() -> None:
    y, weight = torch.ones(2, D, requires_grad=True), torch.ones(2, requires_grad=True)
    out = combine_rows(y, weight, torch.tensor([3, 3]), 5, None)
    assert torch.equal(out.sum(1), torch.tensor([0.0, 0.0, 0.0, 2.0 * D, 0.0]))

    x = torch.randn(4, D, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    combine_rows(gather_rows(x, nothing, None), torch.empty(0), nothing, 4, None).sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, D))


def test_gradients_are_those_of_finite_differences() -> None:
    token, place = permutation()
    x = torch.randn(T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.rand(T * K, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    for map_TK in (place, None):
        both = lambda a, w, m=map_TK: combine_rows(gather_rows(a, token, m).square(), w, token, T, m)  # noqa: E731
        assert torch.autograd.gradcheck(both, (x, weight))
