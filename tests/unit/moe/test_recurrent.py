"""The recurrent router: its cell, what travels along depth, and the cell that a model's layers share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.base import tie_routers
from moetrain.moe.routers.recurrent import RecurrentTopKRouter, RecurrentTopKRouterConfig
from moetrain.moe.routing import Routing
from moetrain.testing import assert_close
from moetrain.testing.scenarios import SCENARIOS

T, D, P, E, K, LAYERS = 14, 7, 4, 6, 2, 3


def make(layers: int = LAYERS, **settings: object) -> list[RecurrentTopKRouter]:
    config = RecurrentTopKRouterConfig(top_k=K, renormalise=True, state_size=P, **settings)  # type: ignore[arg-type]
    routers = [config.build(D, E, dtype=torch.float64) for _ in range(layers)]
    tie_routers(routers)
    for i, router in enumerate(routers):
        for parameter in router.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i + parameter.numel()))
    return routers


def inputs(layer: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)


def through(routers: list[RecurrentTopKRouter], *, order: Tensor | None = None, ctx: ForwardContext | None = None) -> list[Routing]:
    ctx = ctx or ForwardContext(batch_size=1, seq_len=T, training=True)
    order = torch.arange(T) if order is None else order
    return [router(inputs(i)[order], ctx.at(f"layers.{i}")) for i, router in enumerate(routers)]


def gru(cell: nn.GRUCell, u: Tensor, h: Tensor) -> Tensor:
    """Reset gate on the matrix product and its bias, update gate keeping the old state."""
    (ir, iz, inn), (hr, hz, hn) = (
        (x @ w.T + b).chunk(3, dim=1) for x, w, b in ((u, cell.weight_ih, cell.bias_ih), (h, cell.weight_hh, cell.bias_hh))
    )
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    return (1 - z) * torch.tanh(inn + r * hn) + z * h


def test_states_follow_the_equations_along_depth() -> None:
    routers = make()
    state = torch.zeros(T, P, dtype=torch.float64)
    for i, (router, routing) in enumerate(zip(routers, through(routers), strict=True)):
        state = gru(router.cell, inputs(i) @ router.projection.T, state)
        assert_close(routing.logits, state @ router.weight.T, "layout")


def test_tokens_do_not_see_each_other() -> None:
    routers, order = make(), torch.randperm(T, generator=torch.Generator().manual_seed(0))
    for plain, permuted in zip(through(routers), through(routers, order=order), strict=True):
        assert_close(permuted.logits, plain.logits[order], "layout")


@pytest.mark.parametrize(("state", "reaches"), [("carried", True), ("detached", False), ("restarted", False)])
@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_the_gradient_of_later_logits_reaches_earlier_projections_only_through_the_state(cell: str, state: str, reaches: bool) -> None:
    routers = make(cell=cell, state=state)
    through(routers)[-1].logits.square().sum().backward()
    assert (routers[0].projection.grad is not None) is reaches
    assert not reaches or bool((routers[0].projection.grad != 0).any())


def test_ablations_change_values_as_they_say() -> None:
    carried, detached, restarted = (through(make(state=state)) for state in ("carried", "detached", "restarted"))
    assert torch.equal(carried[-1].logits, detached[-1].logits)
    assert not torch.allclose(carried[-1].logits, restarted[-1].logits)
    assert_close(carried[0].logits, restarted[0].logits, "exact")
    router = make(state="restarted")[-1]
    zero = torch.zeros(T, P, dtype=torch.float64)
    assert_close(restarted[-1].logits, gru(router.cell, inputs(LAYERS - 1) @ router.projection.T, zero) @ router.weight.T, "layout")


def test_the_layers_of_a_model_share_one_cell() -> None:
    scenario = SCENARIOS["recurrent"]
    with torch.device("meta"):
        model, other = (scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=scenario.dtype) for _ in range(2))
    routers = [layer.router for layer in model.moe_layers().values()]
    assert len(routers) > 1 and all(router.cell is routers[0].cell for router in routers)
    assert len({id(router.projection) for router in routers}) == len(routers)
    names = [name for name, _ in model.named_parameters() if ".cell." in name]
    assert names == [f"tied.router.cell.{kind}_{side}h" for kind in ("weight", "bias") for side in "ih"]
    assert next(iter(other.moe_layers().values())).router.cell is not routers[0].cell
