"""Replays the vectors ``noisy-topk``: Shazeer's gate and its two losses."""

import torch
from replay import DrawnContext, context

from moetrain.moe.losses.variation import ImportanceConfig, LoadConfig
from moetrain.moe.routers.noisy import NoisyTopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "noisy-topk"
META, DATA = golden(SLUG)


def test_gate_and_losses():
    x = DATA["x"].clone().requires_grad_()
    tokens, hidden = x.shape
    made = NoisyTopKRouterConfig(top_k=META["K"], noise_epsilon=META["noise_epsilon"]).build(hidden, META["E"], dtype=x.dtype)
    with torch.no_grad():
        made.weight.copy_(DATA["w_gate"].T)
        made.noise_weight.copy_(DATA["w_noise"].T)
    ctx = DrawnContext(context(tokens), {"logit_noise": torch.special.ndtr(DATA["noise"])})
    routing = made(x, ctx)
    assert torch.equal(routing.expert_TK, DATA["topk_indices"])
    assert_close(routing.weight_TK, DATA["topk_gates"], kind="golden")

    loss = sum(config(scope="rank").build()(routing, ctx) for config in (ImportanceConfig, LoadConfig))
    assert_close(loss, DATA["loss"], kind="golden")
    loss.backward()
    for actual, key in ((x.grad, "grad_x"), (made.weight.grad.T, "grad_w_gate"), (made.noise_weight.grad.T, "grad_w_noise")):
        # the reference takes the variation of its sums in float32, gradients included
        assert_close(actual.float(), DATA[key].float(), kind="golden")


def test_every_tensor_is_replayed():
    inputs = {"x", "w_gate", "w_noise", "noise"}
    assert set(DATA) == inputs | {"topk_gates", "topk_indices", "loss", "grad_x", "grad_w_gate", "grad_w_noise"}
