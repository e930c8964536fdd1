"""rms_norm against torch's own in float64, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from moetrain.ops.rms_norm import rms_norm
from moetrain.testing import assert_close


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 1), (0, 4), (6,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch_in_float64(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1:], generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for op, wide in ((rms_norm, dtype), (lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), torch.float64)):
        a, w = (t.to(wide).clone().requires_grad_() for t in (x, weight))
        y = op(a, w, 1e-6)
        y.backward(grad.to(wide))
        results.append({"y": y, "x.grad": a.grad, "weight.grad": w.grad})
    assert_close(*results, "fast_path")
    assert all(value.dtype == dtype for value in results[0].values())


def test_strided_inputs_and_gradients():
    x = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-6).transpose(0, 1), (x, weight))
    rms_norm(x, weight, 1e-6).sum().backward()  # an expanded gradient
    assert x.grad.shape == x.shape


def test_zeros_stay_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-6).sum().backward()
    assert bool(x.grad.isfinite().all())
