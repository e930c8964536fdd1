"""Triton kernels against float64 references: on CUDA, or on CPU where TRITON_INTERPRET=1 (test_triton_interpreter.py does that)."""

import os

import pytest
import torch

pytestmark = pytest.mark.gpu
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; test_triton_interpreter.py runs these on CPU", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from moetrain.kernels.triton_ops import grouped_gemm, tiles  # noqa: E402
from moetrain.testing.kernel_cases import checks  # noqa: E402

CHECKS = checks()


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name):
    CHECKS[name]()


def test_tiles_of_the_backward_of_the_activation_are_whole_parts():
    for shipped in [*tiles.TILES["activation_backward"].values(), tiles.HARD.values()]:
        assert all(tile.columns % grouped_gemm.PART.value == 0 for tile in shipped)
