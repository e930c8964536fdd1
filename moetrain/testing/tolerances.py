"""The one table of tolerances. A test that fails needs a cause, not a wider entry here.

Every comparison is ``max|a - b| <= tolerance * max(1, max|b|)`` per tensor, where ``b`` is what is expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["exact", "layout", "golden", "fast_path"]
"""exact: bit for bit. layout: any parallel layout against one process. golden: against stored vectors of another
implementation. fast_path: a fast operation against its slow twin, which sums in another order."""

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "exact": {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0},
    "layout": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "golden": {torch.float64: 1e-9, torch.float32: 1e-5},
    "fast_path": {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3},
}
"""By kind and dtype of the less precise side. Integers and booleans are always compared exactly."""

Comparable = Tensor | float | Mapping[str, Tensor]


def assert_close(actual: Comparable, expected: Comparable, kind: Kind, *, name: str = "value") -> None:
    """Raises AssertionError naming the tensor, the error and the place of the largest one.

    actual, expected: tensors of equal shape (DTensors are gathered: collective), numbers (float64), or mappings
    with equal keys. NaN equals NaN and an infinity itself. Raises KeyError for a dtype without a tolerance.
    """
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), _keys(actual, expected, name)
        for key, value in expected.items():
            assert_close(actual[key], value, kind, name=f"{name}[{key}]")
        return
    assert not isinstance(actual, Mapping), f"{name}: a mapping, expected one tensor"
    a, b = _tensor(actual), _tensor(expected)
    assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if not (a.is_floating_point() or b.is_floating_point()):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {b.numel()} entries differ"
        return
    tolerance = max(TOLERANCES[kind][x.dtype] for x in (a, b) if x.is_floating_point())
    a, b = a.double(), b.double()
    error, scale = _errors(a, b)
    worst = float(error.max()) if error.numel() else 0.0
    if worst > tolerance * scale:
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        found = f"{float(a[place]):.17g}, expected {float(b[place]):.17g}"
        raise AssertionError(f"{name}: max|a-b| = {worst:.3e} > {tolerance:g} * {scale:.3e} ({kind}) at {place}: {found}")


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The left side of the comparison over ``max(1, max|b|)``: what :func:`assert_close` holds against the tolerance."""
    error, scale = _errors(_tensor(actual).double(), _tensor(expected).double())
    return float(error.max()) / scale if error.numel() else 0.0


def _errors(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """|a - b|, infinite where only one is NaN, and the scale of b; both float64 and of equal shape."""
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    finite = b[b.isfinite()].abs()
    return error, max(1.0, float(finite.max()) if finite.numel() else 1.0)


def _tensor(value: Tensor | float) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def _keys(actual: Comparable, expected: Mapping[str, Tensor], name: str) -> str:
    keys = set(actual) if isinstance(actual, Mapping) else set()
    return f"{name}: missing {sorted(set(expected) - keys)}, unexpected {sorted(keys - set(expected))}"
