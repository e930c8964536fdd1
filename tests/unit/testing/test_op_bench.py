"""The benchmark of operations: equal results, right counts, and errors that show."""

from dataclasses import replace

import pytest
import torch

from moetrain.testing.op_bench import Operation, OpSizes, make_operations, measure

CPU = torch.device("cpu")
SIZES = OpSizes(tokens=20, hidden=16, width=8, experts=5, top_k=2, vocab_size=30)


def operation(name: str, **changes: object) -> Operation:
    (found,) = (op for op in make_operations(replace(SIZES, **changes), CPU) if op.name == name)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("sizes", [SIZES, replace(SIZES, tokens=1, experts=1, top_k=1), replace(SIZES, top_k=5, hidden=128)], ids=str)
def test_every_fast_path_equals_its_twin(sizes: OpSizes, dtype: str) -> None:
    errors = {op.name: op.error() for op in make_operations(replace(sizes, dtype=dtype), CPU)}
    assert max(errors.values()) <= 1, errors


def test_a_wrong_result_is_seen_in_outputs_gradients_and_indices() -> None:
    gather, sort = operation("gather_rows"), operation("sort_by_expert")
    assert replace(gather, fast=lambda x: (1.01 * gather.fast(x)[0],)).error() > 1
    assert replace(gather, fast=lambda x: (gather.fast(x)[0].detach() + 0 * x.sum(),)).error() > 1  # right output, no gradient
    assert replace(sort, fast=lambda: (sort.fast()[0].flip(0), *sort.fast()[1:])).error() > 1


def test_bytes_and_flops() -> None:
    x, y = 20 * 16 * 4, 40 * 16 * 4  # bytes of tokens and of rows
    assert operation("gather_rows").least_bytes() == 2 * (x + y + 40 * 8)
    assert operation("gather_rows", dtype="bfloat16").least_bytes() == x + y + 2 * 40 * 8
    assert operation("sort_by_expert").least_bytes() == 40 * 8 + (2 * 40 + 5) * 8
    assert operation("rms_norm").least_bytes() == (2 * x + 16 * 4) + (3 * x + 2 * 16 * 4)
    assert operation("expert_ffn").flops == 9 * 2 * 40 * 16 * 8
    assert operation("cross_entropy").flops == 3 * 2 * 20 * 16 * 30


def test_rounds_of_both_are_kept_without_the_warm_up() -> None:
    order: list[str] = []
    gather = operation("gather_rows")

    def noted(name: str, op):  # type: ignore[no-untyped-def]
        return lambda x: order.append(name) or op(x)

    speed = measure(replace(gather, fast=noted("fast", gather.fast), slow=noted("slow", gather.slow)), 3, CPU)
    assert len(speed.fast) == len(speed.slow) == 3 and min(p.backward for p in speed.fast + speed.slow) > 0
    timed = order[2:10]  # after the comparison; the first pair is the warm-up
    assert [timed.count(name) for name in ("fast", "slow")] == [4, 4] and timed[2:6] == ["slow", "fast", "fast", "slow"]
