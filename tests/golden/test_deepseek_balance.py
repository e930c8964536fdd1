"""Replays the vectors ``deepseek-balance``: V2 and V3 routing, their losses with gradients, bias steps."""

import pytest
import torch
from replay import context, route_logits, router

from moetrain.moe.capacity.policies import DeviceBudgetConfig
from moetrain.moe.context import LayerStatistics
from moetrain.moe.losses.balance import CommunicationBalanceConfig, DeviceBalanceConfig, ExpertBalanceConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "deepseek-balance"
META, DATA = golden(SLUG)
C = META["config"]
E, K, DEVICES, M = C["E"], C["K"], C["devices"], C["M"]
SEQUENCES = C["sequences"]
LATER = ("mtp.", "params.", "grads.")
"""Multi-token prediction comes with a later version; these tensors belong to it."""

V2 = dict(top_k=K, num_groups=DEVICES, groups_per_token=M, scale=C["v2_scale"])
V3 = dict(
    top_k=K, score="sigmoid", renormalise=True, scale=C["v3_scale"], num_groups=DEVICES, groups_per_token=M, group_score_experts=K // M
)


def ctx():
    return context(DATA["logits"].shape[0], batch_size=SEQUENCES)


def test_every_tensor_is_replayed_or_known_to_come_later():
    known = {"logits", "v2.dlogits_comm", "v2.dlogits_device", "v2.dlogits_expert", "v2.dropped", "v2.dropped_first_sequence_exempt",
             "v2.gate", "v2.index", "v2.losses", "v2.scores", "v3.bias", "v3.dgate", "v3.dlogits_from_dgate", "v3.dlogits_seq", "v3.gate",
             "v3.index", "v3.seq_loss", "v3.step_bias", "v3.step_counts", "v3.step_logits"}  # fmt: skip
    assert {key for key in DATA if not key.startswith(LATER)} <= known


def test_v2_device_limited_routing():
    routing = route_logits(DATA["logits"], ctx(), **V2)
    assert torch.equal(routing.expert_TK, DATA["v2.index"])
    assert_close(routing.weight_TK, DATA["v2.gate"], kind="golden")
    assert_close(routing.probs, DATA["v2.scores"], kind="golden")
    devices = (routing.expert_TK // (E // DEVICES)).sort(dim=1).values
    assert bool(((devices.diff(dim=1) > 0).sum(1) + 1 <= M).all())


@pytest.mark.parametrize("number", range(3), ids=["expert", "device", "comm"])
def test_v2_losses(number):
    configs = [
        ExpertBalanceConfig(),
        DeviceBalanceConfig(num_devices=DEVICES),
        CommunicationBalanceConfig(num_devices=DEVICES, devices_per_token=M),
    ]
    logits = DATA["logits"].clone().requires_grad_()
    loss = configs[number].build()(route_logits(logits, ctx(), **V2), ctx())
    assert_close(loss, DATA["v2.losses"][number], kind="golden")
    loss.backward()
    assert_close(logits.grad, DATA[f"v2.dlogits_{('expert', 'device', 'comm')[number]}"], kind="golden")


@pytest.mark.parametrize("exempt_first", [False, True], ids=["all", "first-sequence-exempt"])
def test_v2_device_budget(exempt_first):
    routing = route_logits(DATA["logits"], ctx(), **V2)
    tokens = DATA["logits"].shape[0]
    exempt = torch.arange(tokens) < C["tokens_per_sequence"] if exempt_first else None
    kept = DeviceBudgetConfig(num_devices=DEVICES).build().kept(routing, exempt)
    expected = DATA["v2.dropped_first_sequence_exempt" if exempt_first else "v2.dropped"]
    assert torch.equal(kept.view(tokens, K), expected == 0)


def test_v3_routing():
    logits = DATA["logits"].clone().requires_grad_()
    routing = route_logits(logits, ctx(), bias=DATA["v3.bias"], **V3)
    assert torch.equal(routing.expert_TK, DATA["v3.index"])
    assert_close(routing.weight_TK, DATA["v3.gate"], kind="golden")
    (routing.weight_TK * DATA["v3.dgate"]).sum().backward()
    assert_close(logits.grad, DATA["v3.dlogits_from_dgate"], kind="golden")


def test_v3_sequence_loss():
    logits = DATA["logits"].clone().requires_grad_()
    routing = route_logits(logits, ctx(), bias=DATA["v3.bias"], **V3)
    loss = ExpertBalanceConfig(choices="unbiased").build()(routing, ctx())
    assert_close(loss, DATA["v3.seq_loss"][0], kind="golden")
    loss.backward()
    assert_close(logits.grad, DATA["v3.dlogits_seq"], kind="golden")


def test_v3_bias_steps():
    made = router(1, E, torch.float64, selection_bias=True, bias_update_rate=C["gamma"], **V3)
    made.selection_bias = DATA["v3.step_bias"][0].clone()
    for step in range(C["steps"]):
        logits = DATA["v3.step_logits"][step]
        routing = made.route(logits, context(logits.shape[0], batch_size=SEQUENCES))
        assert torch.equal(routing.selected, DATA["v3.step_counts"][step])
        zero = torch.zeros(())
        made.end_step(LayerStatistics(routing.selected, routing.dispatched, zero, zero))
        assert_close(made.selection_bias, DATA["v3.step_bias"][step + 1], kind="golden")
