"""The fused block of experts against its slow twin, forward and backward, over awkward shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.ops.activations import ACTIVATIONS, Activation
from moetrain.ops.expert_ffn import expert_ffn, reference, saved_bytes_per_row
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.permute import Rows, inverse_permutation
from moetrain.testing import assert_close

D, F, OUT = 8, 6, 7
COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 9, 2],
    "empty first and last": [0, 5, 7, 0],
    "one expert": [12],
    "one row": [0, 1, 0],
    "no rows": [0, 0, 0],
    "many experts": [0, 1, 2, 1] * 3,
}
FORMS = ("rows in order", "even", "uneven")


def make_rows(form: str, count: int) -> tuple[Rows | None, int]:
    """Rows and the number of tokens T."""
    generator = torch.Generator().manual_seed(1)
    if form == "rows in order":
        return None, count
    if form == "even":
        order = torch.randperm(count, generator=generator)
        top_k = 3 if count % 3 == 0 and count else 1
        return Rows(order // top_k, inverse_permutation(order), None, count // top_k), count // top_k
    return Rows.of(torch.randint(5, (count,), generator=generator) * 2, 11), 11


def inputs(counts: list[int], tokens: int, dtype: torch.dtype, *, gated: bool, masters: torch.dtype | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    experts, wide = len(counts), torch.promote_types(dtype, torch.float32)
    return {
        "x": draw(tokens, D).to(dtype),
        "w_in": draw(experts, F * (2 if gated else 1), D).to(masters or dtype),
        "w_out": draw(experts, OUT, F).to(masters or dtype),
        "weight": draw(sum(counts)).abs().to(wide),
    }


def apply(op: Any, counts: list[int], rows: Rows | None = None, *, activation: Activation = "silu", gated: bool = True) -> Any:
    """The operation as a function of leaves by name."""
    return lambda x, w_in, w_out, weight=None: op(
        x, [ExpertSet((w_in, w_out), torch.tensor(counts))], rows=rows, weight=weight, activation=activation, gated=gated
    )


def run(op: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = op(**leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), **{f"{name}.grad": t.grad for name, t in leaves.items() if t.grad is not None}}


def compare(tensors: dict[str, Tensor], counts: list[int], rows: Rows | None, *, gated: bool, activation: Activation) -> None:
    fast = run(apply(expert_ffn, counts, rows, activation=activation, gated=gated), tensors)
    slow = run(apply(reference, counts, rows, activation=activation, gated=gated), {n: t.double() for n, t in tensors.items()})
    assert fast.keys() == slow.keys()
    assert all(fast[f"{name}.grad"].dtype == t.dtype for name, t in tensors.items())
    dtype = tensors["x"].dtype  # in which the products are made: the float32 gradient of weights is no more exact than they are
    assert_close({n: t.to(dtype) for n, t in fast.items()}, {n: t.to(dtype) for n, t in slow.items()}, "fast_path")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_equals_its_slow_twin(counts: list[int], form: str, dtype: torch.dtype) -> None:
    rows, tokens = make_rows(form, sum(counts))
    tensors = inputs(counts, tokens, dtype, gated=True)
    if rows is None:
        del tensors["weight"]
    compare(tensors, counts, rows, gated=True, activation="silu")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: Activation, gated: bool, weighted: bool) -> None:
    counts = [3, 0, 6]
    rows, tokens = make_rows("even", 9)
    tensors = inputs(counts, tokens, torch.float64, gated=gated)
    if not weighted:
        del tensors["weight"]
    compare(tensors, counts, rows, gated=gated, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rows_of_a_busy_expert_are_taken_in_several_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.ops.expert_ffn.LONGEST_RUN", 4)
    counts = [0, 9, 4, 2]
    rows, tokens = make_rows("even", sum(counts))
    compare(inputs(counts, tokens, dtype, gated=True), counts, rows, gated=True, activation="silu")


def test_many_runs_of_a_busy_expert_do_not_stagnate_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of positive numbers grow beyond what one more run can change if they are rounded after each."""
    monkeypatch.setattr("moetrain.ops.expert_ffn.LONGEST_RUN", 4)
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    w_in, w_out = (torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    apply(expert_ffn, [4096], activation="relu", gated=False)(x, w_in, w_out).sum().backward()
    assert w_in.grad.item() == w_out.grad.item() == 4096


@pytest.mark.parametrize("longest", [1024, 3])
def test_float32_masters_of_bfloat16_experts_get_float32_gradients(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.ops.expert_ffn.LONGEST_RUN", longest)
    rows, tokens = make_rows("even", 12)
    tensors = inputs([4, 0, 8], tokens, torch.bfloat16, gated=True, masters=torch.float32)
    for name in ("w_in", "w_out"):  # so that the twin, which does not round them, has the same weights
        tensors[name] = tensors[name].bfloat16().float()
    fast = run(apply(expert_ffn, [4, 0, 8], rows), tensors)
    slow = run(apply(reference, [4, 0, 8], rows), {n: t.double() for n, t in tensors.items()})
    assert fast["w_in.grad"].dtype == fast["w_out.grad"].dtype == torch.float32 and fast["y"].dtype == torch.bfloat16
    assert_close({n: t.bfloat16() for n, t in fast.items()}, {n: t.bfloat16() for n, t in slow.items()}, "fast_path")


def test_gradients_are_those_of_finite_differences() -> None:
    counts = [2, 0, 4]
    rows, tokens = make_rows("even", 6)
    leaves = [t.requires_grad_() for t in inputs(counts, tokens, torch.float64, gated=True).values()]
    assert torch.autograd.gradcheck(apply(expert_ffn, counts, rows, activation="gelu"), leaves)


@pytest.mark.parametrize("wanted", ["x", "w_in", "w_out", "weight"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    counts = [2, 4]
    rows, tokens = make_rows("even", 6)
    tensors = inputs(counts, tokens, torch.float32, gated=True)
    every = run(apply(expert_ffn, counts, rows), tensors)
    tensors[wanted].requires_grad_()
    y = apply(expert_ffn, counts, rows)(**tensors)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float())
    assert torch.equal(tensors[wanted].grad, every[f"{wanted}.grad"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_an_expanded_gradient_and_strided_weights() -> None:
    """A sum's gradient has stride zero; copies of experts are views of one buffer."""
    buffer = torch.randn(2, 2 * F * D + OUT * F, dtype=torch.float64)
    w_in, w_out = buffer[:, : 2 * F * D].unflatten(1, (2 * F, D)), buffer[:, 2 * F * D :].unflatten(1, (OUT, F))
    x = torch.randn(5, D, dtype=torch.float64)
    results = []
    for a, b in ((w_in, w_out), (w_in.clone(), w_out.clone())):
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        apply(expert_ffn, [2, 3])(*leaves).sum().backward()
        results.append({name: t.grad for name, t in zip(("x", "w_in", "w_out"), leaves, strict=True)})
    assert_close(results[0], results[1], "fast_path")


@pytest.mark.parametrize("op", [expert_ffn, reference])
@pytest.mark.parametrize("longest", [1024, 2])
@pytest.mark.parametrize("counts", [([4, 1], [3, 0]), ([0, 0], [5, 3]), ([5, 3], [0]), ([], [4, 4]), ([2], [3], [3])], ids=str)
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16], ids=str)
def test_experts_in_several_sets(
    op: Any, masters: torch.dtype, counts: tuple[list[int], ...], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all lay in one; each gets gradients of its own dtype, and only where they are wanted."""
    monkeypatch.setattr("moetrain.ops.expert_ffn.LONGEST_RUN", longest)
    every = [count for some in counts for count in some]
    rows, tokens = make_rows("uneven", 8)
    tensors = {n: t.bfloat16() for n, t in inputs(every, tokens, torch.float64, gated=True).items()}
    whole = run(apply(op, every, rows), {**tensors, "weight": tensors["weight"].float()})
    sizes = [len(some) for some in counts]
    parts = list(zip(*(tensors[name].split(sizes) for name in ("w_in", "w_out")), strict=True))
    parts[0] = tuple(w.to(masters) for w in parts[0])  # a rank's own experts may be wider than its copies of others
    leaves = [tuple(w.clone().requires_grad_() for w in part) for part in parts]
    leaves[-1][0].requires_grad_(False)
    x, weight = (t.clone().requires_grad_() for t in (tensors["x"], tensors["weight"].float()))
    sets = [ExpertSet(part, torch.tensor(some, dtype=torch.int64), sum(some)) for part, some in zip(leaves, counts, strict=True)]
    y = op(x, sets, rows=rows, weight=weight, activation="silu", gated=True)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype))
    found = {"y": y.detach(), "x.grad": x.grad, "weight.grad": weight.grad}
    assert leaves[-1][0].grad is None and all(w.grad.dtype == w.dtype for part in leaves[:-1] for w in part)
    found["w_out.grad"] = torch.cat([part[1].grad.bfloat16() for part in leaves])
    first = torch.cat([part[0].grad.bfloat16() for part in leaves[:-1]])
    found["w_in.grad"] = torch.cat([first, whole["w_in.grad"][len(first) :]])
    assert_close(found, whole, "fast_path")


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_backward(dtype: torch.dtype, top_k: int) -> None:
    """Bytes by the formula, none of which are gathered inputs or outputs of experts: independent of K but for the hidden units."""
    tokens, experts, width, hidden = 64, 8, 16, 128
    order = (torch.arange(tokens * top_k) % experts).argsort(stable=True)
    rows = Rows(order // top_k, inverse_permutation(order), None, tokens)
    counts = torch.full((experts,), tokens * top_k // experts)
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    w_in, w_out = torch.randn(experts, 2 * width, hidden, dtype=dtype), torch.randn(experts, hidden, width, dtype=dtype)
    weight = torch.rand(tokens * top_k, requires_grad=True)
    y = expert_ffn(x, [ExpertSet((w_in, w_out), counts)], rows=rows, weight=weight, activation="silu", gated=True)
    node = y.grad_fn
    kept = {t.data_ptr(): t.nbytes for t in node.saved_tensors if t is not None}
    assert not any(isinstance(value, torch.Tensor | Rows) for value in vars(node).values()), "recomputation would keep it"
    given = {t.data_ptr() for t in (x, w_in, w_out, counts)}
    assert sum(size for place, size in kept.items() if place not in given) == tokens * top_k * saved_bytes_per_row(width, dtype, gated=True)
