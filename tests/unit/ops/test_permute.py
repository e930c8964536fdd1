"""Moving rows: gather and weighted combine against plain indexing, with as many rows for every token or any number."""

from __future__ import annotations

import pytest
import torch

from moetrain.ops.permute import Rows, combine_rows, gather_rows, inverse_permutation
from moetrain.testing import assert_close

T, K, D = 7, 3, 5


def even(seed: int = 0) -> Rows:
    """T * K rows in a random order, K of each token."""
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(seed))
    return Rows(order // K, inverse_permutation(order), None, T)


def uneven() -> Rows:
    """Tokens with several rows, with one and with none, also at the ends."""
    return Rows.of(torch.tensor([5, 1, 1, 3, 5, 1, 2, 5]), T)


ROWS = {"even": even(), "even as uneven": Rows.of(even().token, T), "uneven": uneven()}
by_form = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_form
def test_gather(rows: Rows, dtype: torch.dtype) -> None:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(rows.token.numel(), D, generator=torch.Generator().manual_seed(2)).to(dtype)
    gathered = gather_rows(x, rows)
    assert torch.equal(gathered, x[rows.token])
    gathered.backward(grad)
    expected = torch.zeros(T, D, dtype=torch.float64).index_add(0, rows.token, grad.double())
    assert_close(x.grad, expected.to(dtype), "fast_path")


@by_form
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, None)],
)
def test_combine(rows: Rows, dtype: torch.dtype, weights: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(1)
    count = rows.token.numel()
    y = torch.randn(count, D, generator=generator).to(dtype).requires_grad_()
    weight = None if weights is None else torch.rand(count, generator=generator).to(weights).requires_grad_()
    grad = torch.randn(T, D, generator=generator).to(dtype)
    out = combine_rows(y, weight, rows)
    assert out.dtype == dtype
    out.backward(grad)

    y2, weight2 = y.detach().double().requires_grad_(), torch.ones(count, dtype=torch.float64, requires_grad=True)
    if weight is not None:
        weight2 = weight.detach().double().requires_grad_()
    expected = torch.zeros(T, D, dtype=torch.float64).index_add(0, rows.token, y2 * weight2[:, None])
    expected.backward(grad.double())
    assert_close(out, expected.to(dtype), "fast_path", name="out")
    assert_close(y.grad, y2.grad.to(dtype), "fast_path", name="y.grad")
    if weight is not None:
        assert_close(weight.grad, weight2.grad.to(weight.dtype), "fast_path", name="weight.grad")


def test_narrow_rows_are_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    rows = Rows.of(torch.zeros(257, dtype=torch.int64), 1)
    y = torch.ones(257, 1, dtype=torch.bfloat16)
    y[0] = 256
    assert combine_rows(y, None, rows).item() == 512
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, rows).backward(y)
    assert x.grad.item() == 512


def test_tokens_without_rows_are_zero_and_there_may_be_no_rows_at_all() -> None:
    y, weight = torch.ones(2, D, requires_grad=True), torch.ones(2, requires_grad=True)
    out = combine_rows(y, weight, Rows.of(torch.tensor([3, 3]), 5))
    assert torch.equal(out.sum(1), torch.tensor([0.0, 0.0, 0.0, 2.0 * D, 0.0]))

    x = torch.randn(4, D, requires_grad=True)
    nothing = Rows.of(torch.empty(0, dtype=torch.int64), 4)
    combine_rows(gather_rows(x, nothing), torch.empty(0), nothing).sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, D))


@by_form
def test_gradients_are_those_of_finite_differences(rows: Rows) -> None:
    x = torch.randn(T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.rand(rows.token.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: combine_rows(gather_rows(a, rows).square(), w, rows), (x, weight))


@by_form
def test_reordered_rows_are_the_same_rows(rows: Rows) -> None:
    order = torch.randperm(rows.token.numel(), generator=torch.Generator().manual_seed(5))
    moved = rows.reordered(order)
    assert torch.equal(moved.token, rows.token[order])
    y = torch.randn(rows.token.numel(), D)
    assert torch.equal(combine_rows(y[order], None, moved), combine_rows(y, None, rows))


def test_the_sum_of_a_permutation_brings_rows_back() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(6))
    rows = Rows(order, inverse_permutation(order), None, 9)
    x = torch.randn(9, D)
    assert torch.equal(combine_rows(gather_rows(x, rows), None, rows), x)
