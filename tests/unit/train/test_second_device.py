"""A training step keeps all its tensors on the model's device: seen on a device that ``second_device.py`` makes up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

SCRIPT = Path(__file__).parents[2] / "second_device.py"
SINGLE = ["deepseek", "glam_capacity", "zero_experts", "ragged_recompute", "noisy_gates", "stochastic", "zipf"]

pytestmark = [
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch makes no devices in Python"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch takes one kind of accelerator at a time"),
]


@pytest.mark.parametrize(("kind", "scenarios"), [("single", SINGLE), ("placed", ["padded"])])
def test_no_operation_mixes_host_and_device(kind, scenarios):
    done = subprocess.run([sys.executable, str(SCRIPT), kind, *scenarios], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] == {}
    for name, (here, there) in result["figures"].items():
        assert there == pytest.approx(here, rel=1e-4), name
