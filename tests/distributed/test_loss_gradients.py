"""The gradient of every registered loss to the router, in float64: finite differences, and one process against four ranks."""

from dataclasses import replace

import pytest
import torch

from moetrain.moe.context import ForwardContext
from moetrain.parallel.layouts import Layout
from moetrain.registry import components
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import merge, train_steps
from moetrain.testing.router_table import RouterCell, fitting_losses, rows, train_all
from moetrain.testing.scenarios import compare

B, S, D = 3, 5, 3
STEP, TOLERANCE = 1e-4, 1e-6
ENTRIES = 24
"""Of each parameter, evenly spread."""


def taker(name):
    """The first row of the table of routers that takes a loss. noisy_topk starts with even loads, where losses are level."""
    return next(row for row in rows() if row != "noisy_topk" and name in fitting_losses(row))


def scenario(row, names, scope=None):
    """What is trained with these losses alone, in their own scope or another."""
    made = RouterCell(row, "none", "single", 1, 1, tuple(names)).scenarios()[1]
    losses = {name: replace(loss, coefficient=1.0) for name, loss in made.parts.loss.items()}
    if scope is not None:
        losses = {name: replace(loss, scope=scope) if hasattr(loss, "scope") else loss for name, loss in losses.items()}
    return replace(made, parts=replace(made.parts, loss=losses))


@pytest.mark.parametrize("name", components("loss"))
def test_finite_differences(name):
    """Through router, capacity, executor and experts of a layer. Counts are constant in the step of a difference."""
    layer = scenario(taker(name), [name]).parts.build(D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    # splits that are soft, permutations that are not decided
    scales = {key: 1e-4 if key.endswith("permutation.scores") else 0.03 for key, _ in layer.named_parameters()}
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            parameter.normal_(0.0, scales[key], generator=generator)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
    valid = torch.arange(B * S) % 5 != 4

    def value():
        ctx = ForwardContext(batch_size=B, seq_len=S, valid=valid, training=True, total_steps=9).at("layers.0")
        layer(x, ctx)
        return ctx.forward.losses[name], ctx.forward.statistics["layers.0.ffn"].selected

    (loss, counts), parameters = value(), dict(layer.router.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 1e-4
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        flat, step = parameter.detach().view(-1), STEP * scales[f"router.{key}"]
        for i in torch.linspace(0, flat.numel() - 1, min(ENTRIES, flat.numel())).long().tolist():
            start, sides = float(flat[i]), []
            for side in (step, -step):
                flat[i] = start + side
                shifted, shifted_counts = value()
                assert torch.equal(shifted_counts, counts), "a choice flips: not away from a boundary"
                sides.append(shifted.item())
            flat[i] = start
            assert abs((sides[0] - sides[1]) / (2 * step) - float(gradient.flatten()[i])) <= TOLERANCE * largest


def test_four_ranks_have_the_gradient_of_one_process():
    """In the scope that each loss has by itself, and over all ranks. One call for all."""
    taken = {}
    for name in components("loss"):
        taken.setdefault(taker(name), []).append(name)
    made = [scenario(row, names, scope) for row, names in taken.items() for scope in (None, "micro_step")]
    by_rank = run_distributed(train_all, 4, [(one, Layout("ep", 1, 4)) for one in made], timeout=120)
    for one, parts in zip(made, zip(*by_rank, strict=True), strict=True):
        print(list(one.parts.loss))  # shown if it fails
        compare(merge(list(parts)), train_steps(0, 1, one, "single"))
