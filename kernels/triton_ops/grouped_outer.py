"""Weight gradients: per expert, left^T @ right summed over its rows; the rows of one side may be gathered on the way in."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.triton_ops.grouped_gemm import load_sizes
from moetrain.kernels.triton_ops.tiles import (
    GROUP_ROWS,
    LARGEST_MATRIX,
    bucket,
    easy,
    precision,
    prepare_boxes,
    programs,
    tuned,
)


def grouped_outer(
    left: Tensor, right: Tensor, counts: Tensor, *, left_source: Tensor | None = None, right_source: Tensor | None = None
) -> Tensor:
    """out[e] = sum over the rows n of expert e of left[left_source[n]]^T right[right_source[n]]; exactly zero without rows.

    left: [., M]; right: [., N]; sources: [rows] int64 or None for the row itself, at most one given; counts: [e] int64.
    Returns [e, M, N] in left's dtype, summed in float32.
    """
    assert left.is_contiguous() and right.is_contiguous() and left.dtype == right.dtype
    assert left_source is None or right_source is None
    height, width = left.shape[1], right.shape[1]
    assert height * width < LARGEST_MATRIX, f"one expert's gradient of {height} x {width} needs 64-bit offsets"
    source = left_source if right_source is None else right_source
    num_rows = left.shape[0] if source is None else source.shape[0]
    out = left.new_empty(len(counts), height, width)
    if not num_rows or not out.numel():
        return out.zero_()
    # The rows past an expert's last must not be summed: one side is read with a mask, the other may be copied in boxes.
    is_easy = easy(left, right)
    boxed = prepare_boxes(is_easy)

    def grid(meta: dict[str, int]) -> tuple[int]:
        count = len(counts) * triton.cdiv(height, meta["ROWS"]) * triton.cdiv(width, meta["COLUMNS"])
        return (programs(count, meta["RESIDENT"], out.device),)

    _outer.serving(is_easy)[grid](
        left, right, source, counts, out, num_rows, height, width, bucket(num_rows, len(counts)), len(counts),
        EXPERTS=triton.next_power_of_2(len(counts)), LEFT_GATHERED=left_source is not None, RIGHT_GATHERED=right_source is not None,
        LEFT_BOXED=boxed and right_source is not None, RIGHT_BOXED=boxed and right_source is None,
        GROUP=GROUP_ROWS, PRECISION=precision(left.dtype),
    )  # fmt: skip
    return out


@triton.jit
def _rows(
    x: tl.tensor,
    box: tl.tensor,
    index: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    width: tl.tensor,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHERED: tl.constexpr,
    BOXED: tl.constexpr,
) -> tl.tensor:
    """Rows begin to begin + DEPTH of some columns: [DEPTH, COLUMNS]; without a box, zeros past the expert's last row."""
    if BOXED:
        values = box.load([begin, first_column])
    else:
        row, column = begin + tl.arange(0, DEPTH), first_column + tl.arange(0, COLUMNS)
        if not GATHERED:
            index = row.to(tl.int64)
        inside = (row[:, None] < end) & (column[None, :] < width)
        values = tl.load(x + index[:, None] * width + column[None, :], mask=inside, other=0.0)
    return values


@triton.jit
def _source_index(source: tl.tensor, begin: tl.tensor, end: tl.tensor, DEPTH: tl.constexpr, GATHERED: tl.constexpr) -> tl.tensor:
    row = begin + tl.arange(0, DEPTH)
    return tl.load(source + row, mask=row < end, other=0) if GATHERED else row.to(tl.int64)


@tuned("outer", ["height", "width", "bucket"])
@triton.jit(do_not_specialize=["num_rows", "bucket"], do_not_specialize_on_alignment=["source", "counts"])
def _outer(
    left: tl.tensor,
    right: tl.tensor,
    source: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    bucket: tl.tensor,
    num_experts: tl.tensor,
    EXPERTS: tl.constexpr,
    LEFT_GATHERED: tl.constexpr,
    RIGHT_GATHERED: tl.constexpr,
    LEFT_BOXED: tl.constexpr,
    RIGHT_BOXED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
    RESIDENT: tl.constexpr,
) -> None:
    DEPTH: tl.constexpr = DEPTH_BYTES // (left.dtype.element_ty.primitive_bitwidth // 8)
    left_box = left
    if LEFT_BOXED:
        left_box = tl.make_tensor_descriptor(left, [num_rows, height], [height, 1], [DEPTH, ROWS])
    right_box = right
    if RIGHT_BOXED:
        right_box = tl.make_tensor_descriptor(right, [num_rows, width], [width, 1], [DEPTH, COLUMNS])
    ids = tl.arange(0, EXPERTS)
    sizes = load_sizes(counts, num_experts, EXPERTS)
    row_tiles, column_tiles = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), num_experts * row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (row_tiles * column_tiles)
        begin = tl.sum(tl.where(ids < expert, sizes, 0), 0)
        end = begin + tl.sum(tl.where(ids == expert, sizes, 0), 0)
        # GROUP tiles of rows pass over all columns together
        inside = tile % (row_tiles * column_tiles)
        group = inside // (GROUP * column_tiles)
        group_height = tl.minimum(row_tiles - group * GROUP, GROUP)
        inside = inside % (GROUP * column_tiles)
        first_row = (group * GROUP + inside % group_height) * ROWS
        first_column = inside // group_height * COLUMNS
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        index = _source_index(source, begin, end, DEPTH, LEFT_GATHERED or RIGHT_GATHERED)
        for k in range(begin, end, DEPTH):
            # past the expert's last row one factor is zero and the other is another expert's row, or zero after the last row
            a = _rows(left, left_box, index, k, end, first_row, height, DEPTH, ROWS, LEFT_GATHERED, LEFT_BOXED)
            b = _rows(right, right_box, index, k, end, first_column, width, DEPTH, COLUMNS, RIGHT_GATHERED, RIGHT_BOXED)
            # read one step ahead: rows whose place is still on its way could not be fetched ahead themselves
            index = _source_index(source, k + DEPTH, end, DEPTH, LEFT_GATHERED or RIGHT_GATHERED)
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        pointer = out + expert.to(tl.int64) * height * width + row[:, None] * width + column[None, :]
        tl.store(pointer, sums.to(out.dtype.element_ty), mask=(row[:, None] < height) & (column[None, :] < width))
