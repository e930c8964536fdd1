"""Replays the vectors ``activation-dense-to-sparse``: gates and gradients for each activation and temperature."""

import re

import pytest
import torch
from replay import context, dense_map

from moetrain.moe.routers.dense_to_sparse import DenseToSparseRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "activation-dense-to-sparse"
META, DATA = golden(SLUG)
CASES = sorted(name.removesuffix(".gates") for name in DATA if name.endswith(".gates"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{SLUG}-{case}")
def test_gate(case):
    activation, temperature = re.fullmatch(r"(\w+)\.tau([\d.]+)", case).groups()
    experts, hidden = DATA["weight"].shape
    config = DenseToSparseRouterConfig(
        activation=activation, logit_bias=True, decay="learned", temperature=float(temperature), noise=False, threshold=0.0
    )
    made = config.build(hidden, experts, dtype=torch.float64)
    start = torch.tensor([made.initial["log_temperature"]], dtype=torch.float64)
    made.load_state_dict({"weight": DATA["weight"], "bias": DATA["bias"], "decayed": torch.zeros(()), "log_temperature": start})
    x = DATA["x"].clone().requires_grad_()
    gates = dense_map(made(x, context(x.shape[0])))[1]
    assert_close(gates, DATA[f"{case}.gates"], kind="golden")
    (gates * torch.linspace(-1, 1, gates.numel(), dtype=gates.dtype).view_as(gates)).sum().backward()
    assert_close(x.grad, DATA[f"{case}.grad_x"], kind="golden")
    assert_close(made.weight.grad, DATA[f"{case}.grad_weight"], kind="golden")
    # ours is the gradient of the logarithm
    assert_close(made.log_temperature.grad / float(temperature), DATA[f"{case}.grad_tau"], kind="golden")


def test_every_tensor_is_replayed():
    outputs = {f"{case}.{part}" for case in CASES for part in ("gates", "grad_x", "grad_weight", "grad_tau")}
    assert set(DATA) == {"x", "weight", "bias"} | outputs
