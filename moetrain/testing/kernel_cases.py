"""Checks of the Triton kernels against float64 references, over awkward shapes: on CUDA, or on CPU where TRITON_INTERPRET=1.

Used by the tests and by scripts/gpu_suite.sh, which has no pytest. Importing it needs Triton, and may start CUDA.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moetrain.kernels.triton_ops import expert_ffn, grouped_gemm, grouped_outer, router, tiles
from moetrain.kernels.triton_ops.segment_sum import combine_backward, segment_sum
from moetrain.kernels.triton_ops.sort_experts import sort_by_expert
from moetrain.ops import expert_ffn as block_operation
from moetrain.ops import permute
from moetrain.ops.activations import Activation, hidden_activation
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.permute import Rows
from moetrain.testing.tolerances import assert_close

INTERPRETED = tiles.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
"""tl.dot of bfloat16 is garbage in the interpreter."""
TUNED = {
    "plain": grouped_gemm._plain,
    "activation": grouped_gemm._activation,
    "activation_backward": grouped_gemm._activation_backward,
    "outer": grouped_outer._outer,
}


@dataclass(frozen=True)
class Case:
    """Of the expert block. used: experts that get rows; the first ones get none. copied: of the experts, the last ones, which lie in
    a buffer of their own."""

    tokens: int = 13
    width: int = 32
    hidden: int = 16
    experts: int = 5
    top_k: int = 2
    out: int | None = None
    gather: bool = True
    ragged: bool = False
    weighted: bool = True
    activation: Activation = "silu"
    gated: bool = True
    used: int | None = None
    copied: int = 0


CASES = {
    "plain": Case(),
    "ragged gelu_tanh": Case(ragged=True, activation="gelu_tanh"),
    "some experts empty": Case(used=3),
    "one expert has all": Case(used=1, top_k=1),
    "one token": Case(tokens=1),
    "one token, 8 choices": Case(tokens=1, experts=8, top_k=8),
    "one expert": Case(experts=1, top_k=1),
    "256 experts": Case(tokens=3, width=8, hidden=8, experts=256, top_k=8),
    "no multiple of anything": Case(tokens=19, width=33, hidden=17, experts=3, top_k=3),
    "whole vectors, no whole tiles": Case(tokens=19, width=48, hidden=48, experts=2, top_k=2),
    "several tiles of hidden columns": Case(width=16, hidden=144),
    "no whole vectors": Case(width=24, hidden=20),
    "no whole vectors on the way out": Case(out=21),
    "many rows per expert": Case(tokens=61, width=12, hidden=8, experts=2, top_k=1),
    "another output width": Case(out=16),
    "no gather": Case(gather=False, weighted=False),
    "no gather, weighted": Case(gather=False),
    "no gather, odd": Case(gather=False, tokens=18, width=7, hidden=9),
    "ragged": Case(ragged=True, top_k=4),
    "ragged, unweighted, odd": Case(ragged=True, weighted=False, width=19, hidden=23),
    "unweighted": Case(weighted=False),
    "no tokens": Case(tokens=0),
    "no tokens, no gather": Case(tokens=0, gather=False),
    "no experts": Case(experts=0, ragged=True, top_k=0),
    "copies": Case(copied=2),
    "copies, odd": Case(copied=2, ragged=True, width=19, hidden=23),
    "rows for copies only": Case(copied=2, used=2),
    "copies without rows": Case(copied=2, used=5, tokens=1, top_k=1),
    "copies, no gather": Case(copied=3, gather=False, weighted=False),
    "gelu": Case(activation="gelu"),
    "gelu_tanh": Case(activation="gelu_tanh"),
    "relu": Case(activation="relu"),
    **{f"{a}, not gated": Case(activation=a, gated=False) for a in ("silu", "gelu", "gelu_tanh", "relu")},
}
LARGE = {
    "fine": Case(tokens=1000, width=512, hidden=256, experts=64, top_k=8),
    "fine, odd": Case(tokens=777, width=328, hidden=200, experts=60, top_k=6, used=50),
    "coarse": Case(tokens=1500, width=1024, hidden=1536, experts=8, top_k=2),
    "ragged, large": Case(tokens=700, width=272, hidden=528, experts=16, top_k=4, ragged=True),
    "copies, large": Case(tokens=900, width=512, hidden=384, experts=12, top_k=2, copied=3),
    "no gather, large": Case(tokens=1023, width=512, hidden=384, experts=4, gather=False),
}
"""Real tiles deserve real sizes."""
OF_TILES = {
    "odd": Case(tokens=700, width=336, hidden=272, experts=6, top_k=3, used=5),
    # numbers of experts and divisibility of the suite's benchmarks: their kernels are then compiled, by many processes at once
    **{f"{experts} experts": Case(tokens=704, width=336, hidden=272, experts=experts, top_k=3) for experts in (8, 32, 64)},
}
"""For every shipped tile."""


@contextmanager
def only_tile(kernel: str, index: int) -> Iterator[None]:
    """Of one kernel only this shipped tile, of the others the first: measuring all for every shape would take minutes."""
    kept = {name: tuned.shipped.configs for name, tuned in TUNED.items()}
    for name, tuned in TUNED.items():
        tuned.shipped.configs = [tiles.tiles(name)[index if name == kernel else 0].config()]
    try:
        yield
    finally:
        for name, tuned in TUNED.items():
            tuned.shipped.configs = kept[name]


def make(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Arguments of the expert block with rows sorted by expert, on the device."""
    generator = torch.Generator().manual_seed(case.tokens + 7 * case.width + 13 * case.experts)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(DEVICE)

    per_token = torch.full((case.tokens,), case.top_k if case.gather else 1)
    if case.ragged:
        per_token = torch.randint(0, case.top_k + 1, (case.tokens,), generator=generator)
    num_rows = int(per_token.sum())
    first = 0 if case.used is None else case.experts - case.used
    expert = torch.randint(first, max(case.experts, 1), (num_rows,), generator=generator)
    order = expert.argsort(stable=True)
    token = torch.arange(case.tokens).repeat_interleave(per_token)[order]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), per_token.cumsum(0)])
    fan_in = 2 * case.hidden if case.gated else case.hidden
    out = case.out or case.width
    x, w_in = normal(case.tokens, case.width), normal(case.experts, fan_in, case.width, std=case.width**-0.5)
    w_out, grad = normal(case.experts, out, case.hidden, std=case.hidden**-0.5), normal(case.tokens, out)
    weight = torch.rand(num_rows, generator=generator).to(DEVICE) if case.weighted else None
    counts = expert.bincount(minlength=case.experts)[: case.experts].to(DEVICE)
    options = {
        "token": token.to(DEVICE) if case.gather else None,
        "weight": weight,
        "place": order.argsort().to(DEVICE) if case.gather else None,
        "bounds": bounds.to(DEVICE) if case.ragged else None,
        "activation": case.activation,
        "gated": case.gated,
    }
    return grad, x, w_in, w_out, counts, options


def sets_of(case: Case, w_in: Tensor, w_out: Tensor, counts: Tensor) -> list[ExpertSet]:
    """Own experts and copies, whose weights are parts of one buffer; their rows follow."""
    if not case.copied:
        return [ExpertSet((w_in, w_out), counts)]
    flat, copied = (w_in.flatten(1), w_out.flatten(1)), slice(-case.copied, None)
    parts = torch.cat(flat, dim=1)[copied].split([w.shape[1] for w in flat], dim=1)
    views = tuple(part.unflatten(1, w.shape[1:]) for part, w in zip(parts, (w_in, w_out), strict=True))
    rows = counts.cpu()
    return [
        ExpertSet((w_in[: -case.copied], w_out[: -case.copied]), counts[: -case.copied], int(rows[: -case.copied].sum())),
        ExpertSet(views, counts[copied], int(rows[copied].sum())),
    ]


def reference(
    grad: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, counts: Tensor, *, token: Tensor | None, weight: Tensor | None,
    activation: Any, gated: bool, **_: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """y and the gradients of x, w_in, w_out and weight in float64, one expert at a time."""
    leaves = {"x": x, "w_in": w_in, "w_out": w_out} | ({} if weight is None else {"weight": weight})
    leaves = {name: value.detach().cpu().double().requires_grad_() for name, value in leaves.items()}
    rows = leaves["x"] if token is None else leaves["x"][token.cpu()]
    parts = [
        hidden_activation(part @ w1.t(), activation, gated=gated) @ w2.t()
        for part, w1, w2 in zip(rows.split(counts.tolist()), leaves["w_in"], leaves["w_out"], strict=True)
    ] if len(counts) else [rows.new_zeros(0, w_out.shape[1])]  # fmt: skip
    y = torch.cat(parts)
    if weight is not None:
        y = y * leaves["weight"][:, None]
    if token is not None:
        y = torch.zeros(len(x), w_out.shape[1], dtype=torch.float64).index_add(0, token.cpu(), y)
    (y * grad.cpu().double()).sum().backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return y.detach(), grads


def check_expert_block(case: Case, dtype: torch.dtype, kernel: str = "plain", index: int = 0) -> None:
    """Forward and backward with one tile."""
    with only_tile(kernel, index):
        _check_expert_block(case, dtype)


def _check_expert_block(case: Case, dtype: torch.dtype) -> None:
    grad, x, w_in, w_out, counts, options = make(case, dtype)
    sets = sets_of(case, w_in, w_out, counts)
    y, h = expert_ffn.forward(x, sets, **options)
    grad_x, grad_weight, gradients = expert_ffn.backward(grad, x, h, sets, **options)
    grad_in, grad_out = (torch.cat([g for g in gradients[i::2] if g is not None]) for i in range(2))
    expected_y, expected = reference(grad, x, w_in, w_out, counts, **options)
    assert y.dtype == h.dtype == dtype
    assert_close(y, expected_y, "fast_path", name="y")
    grads = {"x": grad_x, "w_in": grad_in, "w_out": grad_out, "weight": grad_weight}
    if options["weight"] is None:
        assert grads.pop("weight") is None
    for name, value in grads.items():
        assert value is not None
        assert value.dtype == (torch.float32 if name == "weight" else dtype)
        # the weight's gradient is float32, but h, of which it is made, has the inputs' precision
        assert_close(value.to(dtype), expected[name], "fast_path", name=f"grad_{name}")
    empty = counts == 0
    assert not any(grad[empty].any() for grad in (grad_in, grad_out))


OPERATION_LEAVES = ("x", "weight", "own in", "own out", "copied in", "copied out")


def check_operation(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    """The whole operation, float32 masters and copies in ``dtype``, against its slow twin in float64 on the CPU: only the wanted
    gradients, each in the dtype of its tensor."""
    case = Case(tokens=19, width=32, hidden=16, experts=6, top_k=2, copied=2, ragged=True)
    grad, x, w_in, w_out, counts, options = make(case, dtype)
    own, copied = sets_of(case, w_in, w_out, counts)
    assert options["weight"] is not None
    tensors = (x, options["weight"], *(w.float() for w in own.weights), *copied.weights)
    rows = Rows(options["token"], options["place"], options["bounds"], case.tokens)

    def run(op: Callable[..., Tensor], leaves: list[Tensor], rows: Rows, grad: Tensor) -> dict[str, Tensor | None]:
        for name, leaf in zip(OPERATION_LEAVES, leaves, strict=True):
            leaf.requires_grad_(name in wanted)
        x, weight, *weights = leaves
        pairs = ((own, weights[:2]), (copied, weights[2:]))
        sets = [ExpertSet(tuple(pair), each.counts.to(x.device), each.num_rows) for each, pair in pairs]
        y = op(x, sets, rows=rows, weight=weight, activation=case.activation, gated=case.gated)
        y.backward(grad)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in zip(OPERATION_LEAVES, leaves, strict=True)}}

    with only_tile("plain", 0), kernels_everywhere():
        results = run(block_operation.expert_ffn, [t.detach() for t in tensors], rows, grad)
    expected = run(block_operation.reference, [_wide(t) for t in tensors], _on_cpu(rows), _wide(grad))
    for name, found, dtype_of in zip(results, results.values(), (x.dtype, *(t.dtype for t in tensors)), strict=True):
        value = expected[name]
        assert (found is not None) == (name == "y" or name in wanted) == (value is not None), name
        if found is not None and value is not None:
            assert found.dtype == dtype_of
            assert_close(found.to(dtype), value, "fast_path", name=name)


def check_combine(weighted: bool, dtype: torch.dtype) -> None:
    """Combine and its backward of strided tensors, against plain operations in float64 on the CPU."""
    torch.manual_seed(3)
    rows = Rows.of(torch.randint(5, (11,)).to(DEVICE), 5)
    y, grad = torch.randn(11, 19).to(DEVICE, dtype), torch.randn(19, 5).to(DEVICE, dtype).t()
    weight = torch.rand(11, 2).to(DEVICE)[:, 0] if weighted else None

    def run(y: Tensor, weight: Tensor | None, rows: Rows, grad: Tensor) -> list[Tensor | None]:
        leaves = [t.requires_grad_() for t in (y, weight) if t is not None]
        out = permute.combine_rows(y, weight, rows)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    with kernels_everywhere():
        results = run(y.detach(), weight, rows, grad)
    for found, expected in zip(results, run(_wide(y), None if weight is None else _wide(weight), _on_cpu(rows), _wide(grad)), strict=True):
        assert found is not None and expected is not None
        assert_close(found.to(dtype), expected, "fast_path")


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _on_cpu(rows: Rows) -> Rows:
    return replace(rows, token=rows.token.cpu(), place=rows.place.cpu(), bounds=None if rows.bounds is None else rows.bounds.cpu())


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Operations take the kernels also for tensors on the CPU, where they are interpreted."""
    if not INTERPRETED:
        yield
        return
    found = lambda name, _: importlib.import_module(f"moetrain.kernels.triton_ops.{name}")  # noqa: E731
    with mock.patch.object(block_operation, "triton_kernels", found), mock.patch.object(permute, "triton_kernels", found):
        yield


def check_strides() -> None:
    """A strided gradient and input of the expert block."""
    with only_tile("plain", 0):
        grad, x, w_in, w_out, counts, options = make(Case(), torch.float32)
        sets = [ExpertSet((w_in, w_out), counts)]
        y, h = expert_ffn.forward(x.t().contiguous().t(), sets, **options)
        assert torch.equal(y, expert_ffn.forward(x, sets, **options)[0])
        expanded = grad[:1].expand_as(grad)
        *strided, strided_experts = expert_ffn.backward(expanded, x, h, sets, **options)
        *plain, plain_experts = expert_ffn.backward(expanded.contiguous(), x, h, sets, **options)
        for a, b in zip([*strided, *strided_experts], [*plain, *plain_experts], strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


def check_gathered_product(transposed: bool, depth: int, width: int) -> None:
    """Rows gathered, then one matrix for each expert, then a scale."""
    torch.manual_seed(depth)
    x, counts = torch.randn(9, depth), torch.tensor([4, 0, 17])
    source, scale = torch.randint(0, 9, (21,)), torch.rand(21)
    w = torch.randn(3, width, depth) if transposed else torch.randn(3, depth, width)
    with only_tile("plain", 0):
        y = grouped_gemm.grouped_gemm(*(t.to(DEVICE) for t in (x, w, counts)), source=source.to(DEVICE), transposed=transposed,
                                      scale=scale.to(DEVICE))  # fmt: skip
    own = w.double()[torch.arange(3).repeat_interleave(counts)]
    expected = torch.einsum("nd,nwd->nw" if transposed else "nd,ndw->nw", x.double()[source], own) * scale[:, None]
    assert_close(y, expected, "fast_path")


def check_segment_sum(width: int, weighted: bool) -> None:
    """Sums keep the order of ``place``."""
    torch.manual_seed(width)
    rows, place, bounds = torch.randn(7, width), torch.randperm(7), torch.tensor([0, 3, 3, 4, 7])
    weight = torch.rand(7)
    out = segment_sum(rows.to(DEVICE), 4, place=place.to(DEVICE), bounds=bounds.to(DEVICE), weight=weight.to(DEVICE) if weighted else None)
    scaled = rows * weight[:, None] if weighted else rows
    for t in range(4):
        expected = torch.zeros(width)
        for j in place[bounds[t] : bounds[t + 1]].tolist():
            expected = expected + scaled[j]
        assert_close(out[t], expected, "exact" if INTERPRETED else "fast_path", name=f"token {t}")


def check_combine_backward(width: int, rows: int) -> None:
    """Against float64, in both dtypes."""
    torch.manual_seed(width)
    token, weight = torch.randint(5, (rows,)), torch.rand(rows)
    for dtype in (torch.float32, HALF):
        grad, y = torch.randn(5, width).to(dtype), torch.randn(rows, width).to(dtype)
        grad_y, grad_weight = combine_backward(*(t.to(DEVICE) for t in (grad, y, token, weight)))
        reaching = grad.double()[token]
        assert grad_y.dtype == dtype and grad_weight.dtype == torch.float32
        assert_close(grad_y, reaching * weight[:, None], "fast_path", name="grad_y")
        assert_close(grad_weight.to(dtype), (reaching * y.double()).sum(1), "fast_path", name="grad_weight")


def check_sort(num_ids: int, num_experts: int, padded: bool) -> None:
    """The sort is stable and puts padding last."""
    torch.manual_seed(num_ids)
    expert = torch.randint(-1 if padded else 0, num_experts, (num_ids,))
    order, counts, place = sort_by_expert(expert.to(DEVICE), num_experts)
    key = expert.where(expert >= 0, num_experts)
    assert torch.equal(order.cpu(), key.argsort(stable=True))
    assert torch.equal(counts.cpu(), key.bincount(minlength=num_experts)[:num_experts])
    assert torch.equal(place.cpu(), order.cpu().argsort())


def check_router(num_tokens: int, num_experts: int, top_k: int, renormalise: bool) -> None:
    """Results and gradients, each alone and all together; ties go to the lower id."""
    torch.manual_seed(num_experts)
    logits = torch.randn(num_tokens, num_experts).mul(4).round() / 4  # many ties
    routed = router.forward(logits.to(DEVICE), top_k, renormalise=renormalise)
    z = logits.double().requires_grad_()
    probs, logsumexp = z.softmax(1), z.logsumexp(1)
    index = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weight = probs.gather(1, index)
    if renormalise:
        weight = weight / weight.sum(1, keepdim=True)
    assert torch.equal(routed.index.cpu(), index)
    assert torch.equal(routed.count.cpu(), index.flatten().bincount(minlength=num_experts))
    expected = {"probs": probs, "weight": weight, "prob_sum": probs.sum(0), "logsumexp": logsumexp}
    for name, value in expected.items():
        assert_close(getattr(routed, name), value, "fast_path", name=name)
    grads = {f"grad_{name}": torch.randn_like(value).float() for name, value in expected.items()}
    for given in [grads, *({name: grad} for name, grad in grads.items())]:
        loss = torch.stack([(expected[name.removeprefix("grad_")] * grad).sum() for name, grad in given.items()]).sum()
        (of_z,) = torch.autograd.grad(loss, z, retain_graph=True)
        found = router.backward(routed, renormalise=renormalise, **{name: grad.to(DEVICE) for name, grad in given.items()})
        assert_close(found, of_z, "fast_path", name=" ".join(given))


def checks() -> dict[str, Callable[[], None]]:
    """Every check by its name; one that fails raises. The cheap ones first, then on CUDA every shipped tile, then every case."""
    found: dict[str, Callable[[], None]] = {}
    cases = CASES if INTERPRETED else CASES | LARGE
    some = {name: CASES[name] for name in ("plain", "no gather", "ragged gelu_tanh", "copies")}
    for depth, width in ((32, 48), (13, 37)):
        for flag in (False, True):
            found[f"gathered product, {depth}x{width}, transposed={flag}"] = partial(check_gathered_product, flag, depth, width)
    for width in (1, 16, 50):
        for flag in (False, True):
            found[f"segment sum, {width}, weighted={flag}"] = partial(check_segment_sum, width, flag)
        for rows in (0, 7):
            found[f"combine backward, {width}, {rows} rows"] = partial(check_combine_backward, width, rows)
    for num_ids, num_experts in ((0, 4), (1, 1), (16, 3), (53, 7), (200, 256), (130, 2)):
        for flag in (False, True):
            found[f"sort, {num_ids} of {num_experts}, padded={flag}"] = partial(check_sort, num_ids, num_experts, flag)
    for shape in ((1, 1, 1), (19, 7, 3), (33, 64, 8), (5, 256, 8), (3, 3, 3), (0, 4, 2)):
        for flag in (False, True):
            found[f"router, {shape}, renormalise={flag}"] = partial(check_router, *shape, flag)
    if not INTERPRETED:  # the interpreter has one tile
        for case_name, case in OF_TILES.items():
            for kernel in TUNED:
                for index in range(len(tiles.tiles(kernel))):
                    found[f"tile {index} of {kernel}, {case_name}"] = partial(check_expert_block, case, HALF, kernel, index)
    for dtype, chosen in ((HALF, some if INTERPRETED else cases), (torch.float32, cases)):
        for name, case in chosen.items():
            found[f"expert block, {name}, {dtype}"] = partial(check_expert_block, case, dtype)
    found["expert block, strides"] = check_strides
    for dtype in (torch.float32, HALF):
        for wanted in [OPERATION_LEAVES, *((name,) for name in OPERATION_LEAVES)]:
            found[f"operation, gradients of {', '.join(wanted)}, {dtype}"] = partial(check_operation, wanted, dtype)
        for weighted in (False, True):
            found[f"combine, weighted={weighted}, {dtype}"] = partial(check_combine, weighted, dtype)
    return found
