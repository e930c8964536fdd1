"""rotate against complex multiplication in float64, forward and backward."""

import pytest
import torch

from moetrain.ops.rotary import rotate
from moetrain.testing import assert_close


def reference(x, angle):
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 2), (4, 6), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_complex_multiplication(shape, strided, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = 6 * torch.rand(shape[-2], shape[-1] // 2, generator=generator, dtype=torch.float64)
    if strided and len(shape) == 4:  # as heads are cut from features
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    a, b = (x.to(wide).detach().clone().requires_grad_() for wide in (dtype, torch.float64))
    y, expected = rotate(a, angle.cos().to(dtype), angle.sin().to(dtype)), reference(b, angle)
    y.backward(grad.to(dtype))
    expected.backward(grad)
    assert_close({"y": y, "x.grad": a.grad}, {"y": expected.detach(), "x.grad": b.grad}, "fast_path")
    assert y.dtype == dtype
