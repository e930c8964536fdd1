"""Products of rows sorted by expert with one matrix per expert, and what can be done with the results before they leave the chip.

Three kernels share one loop: plain products (scaled per row on request), products followed by a (gated) activation, and
products followed by its backward. Rows may be gathered on the way in, so that no sorted copy of the tokens exists
(ScatterMoE 2403.08245, SonicMoE). Grids are persistent and sized without knowing the counts: each program finds the expert of a tile
from the counts on the device. bfloat16, float16 or float32 in, float32 sums.

Letters: N rows, e experts; "depth" is the summed dim, "width" the columns of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.triton_ops.activations import activate, activation_slope
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

PART = tl.constexpr(32)
"""Columns for which the activation's backward keeps one partial sum of <g, a>; every tile's columns are 1, 2, 4, ... parts."""


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    counts: Tensor,
    *,
    source: Tensor | None = None,
    transposed: bool,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y[n] = scale[n] * x[source[n]] @ (w[e(n)]^T if transposed else w[e(n)]).

    x: [T, depth]; source: [N] int64, None: row n is x[n]; w: [e, width, depth] if transposed, else [e, depth, width];
    counts: [e] int64, their sum is N; scale: [N] float32. Returns [N, width] in x's dtype, in ``out`` if there is one.
    """
    num_rows = x.shape[0] if source is None else source.shape[0]
    y = x.new_empty(num_rows, w.shape[1] if transposed else w.shape[2]) if out is None else out
    if y.numel():
        is_easy, shared = _check(x, w, y, source)
        _plain.serving(is_easy)[_grid(num_rows, y.shape[1], counts)](
            x, source, w, counts, scale, y, num_rows, y.shape[1], x.shape[1], bucket(num_rows, len(counts)), len(counts),
            w.stride(0), SCALED=scale is not None, TRANSPOSED=transposed, **shared,
        )  # fmt: skip
    return y


def activation_gemm(
    x: Tensor, w: Tensor, counts: Tensor, *, source: Tensor | None, activation: str, gated: bool, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h[n] = x[source[n]] @ w[e(n)]^T and a = act(h) or, gated, act(first half of h) * second half.

    x: [T, D]; w: [e, 2F or F, D]; returns h [N, 2F or F] (in the memory given, if any) and a [N, F] in x's dtype; a is computed
    from the rounded h.
    """
    num_rows = x.shape[0] if source is None else source.shape[0]
    hidden = w.shape[1] // 2 if gated else w.shape[1]
    h, a = x.new_empty(num_rows, w.shape[1]) if h is None else h, x.new_empty(num_rows, hidden)
    if a.numel():
        is_easy, shared = _check(x, w, a, source)
        _activation.serving(is_easy)[_grid(num_rows, hidden, counts)](
            x, source, w, counts, h, a, num_rows, hidden, x.shape[1], bucket(num_rows, len(counts)), len(counts), w.stride(0),
            ACTIVATION=activation, GATED=gated, **shared,
        )  # fmt: skip
    return h, a


def activation_backward_gemm(
    grad: Tensor, w: Tensor, h: Tensor, counts: Tensor, *, source: Tensor | None, weight: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Through the second product and the activation: with g = grad[source[n]] @ w[e(n)] and a recomputed from h,

    grad_h = the activation's backward of weight[n] * g, and weight[n] * a, and the combine weight's gradient <g, a>.
    grad: [T, Dout]; w: [e, Dout, F]; h: [N, 2F or F]; weight: [N] float32 or None. Returns [N, 2F or F], [N, F], [N] float32 or None.
    """
    num_rows, hidden = h.shape[0], w.shape[2]
    grad_h, weighted = torch.empty_like(h), h.new_empty(num_rows, hidden)
    dots = None if weight is None else torch.empty(num_rows, triton.cdiv(hidden, PART.value), dtype=torch.float32, device=h.device)
    if weighted.numel():
        is_easy, shared = _check(grad, w, weighted, source)
        _activation_backward.serving(is_easy)[_grid(num_rows, hidden, counts)](
            grad, source, w, counts, h, weight, grad_h, weighted, dots, num_rows, hidden, grad.shape[1],
            bucket(num_rows, len(counts)), len(counts), w.stride(0), ACTIVATION=activation, GATED=gated,
            WEIGHTED=weight is not None, **shared,
        )  # fmt: skip
    return grad_h, weighted, None if dots is None else dots.sum(1)


def _check(x: Tensor, w: Tensor, y: Tensor, source: Tensor | None) -> tuple[bool, dict[str, object]]:
    """Whether x, w and the result y are easy, and constants that all launches share; checks what the kernels take for granted."""
    assert x.is_contiguous() and w[0].is_contiguous() and y.is_contiguous() and x.dtype == w.dtype
    assert w.shape[1] * w.shape[2] < LARGEST_MATRIX, f"one expert's matrix of {tuple(w.shape[1:])} needs 64-bit offsets"
    is_easy = easy(x, w, y) and w.stride(0) % 16 == 0
    boxed = prepare_boxes(is_easy)
    return is_easy, {
        "EXPERTS": triton.next_power_of_2(max(len(w), 1)),
        "GATHERED": source is not None,
        "X_BOXED": boxed and source is None,
        "W_BOXED": boxed,
        "GROUP": GROUP_ROWS,
        "PRECISION": precision(x.dtype),
    }


def _grid(num_rows: int, width: int, counts: Tensor) -> object:
    def grid(meta: dict[str, int]) -> tuple[int]:
        # an expert's last tile may be partly empty: at most one more tile for each expert that has rows
        row_tiles = triton.cdiv(num_rows, meta["ROWS"]) + min(len(counts), num_rows)
        return (programs(row_tiles * triton.cdiv(width, meta["COLUMNS"]), meta["RESIDENT"], counts.device),)

    return grid


@triton.jit
def load_sizes(counts: tl.tensor, num_experts: tl.tensor, EXPERTS: tl.constexpr) -> tl.tensor:
    """Rows of each expert, padded with zeros to a power of two: [EXPERTS] int32."""
    ids = tl.arange(0, EXPERTS)
    return tl.load(counts + ids, mask=ids < num_experts, other=0).to(tl.int32)


@triton.jit
def _locate(
    tile: tl.tensor, sizes: tl.tensor, column_tiles: tl.tensor, ROWS: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The expert of a tile, its first row, the end of that expert's rows, and the tile of columns."""
    ids = tl.arange(0, EXPERTS)
    row_tiles = (sizes + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(row_tiles, 0) * column_tiles <= tile).to(tl.int32), 0)
    begin = tl.sum(tl.where(ids < expert, sizes, 0), 0)
    size = tl.sum(tl.where(ids == expert, sizes, 0), 0)
    inside = tile - tl.sum(tl.where(ids < expert, row_tiles, 0), 0) * column_tiles
    group = inside // (GROUP * column_tiles)
    height = tl.minimum((size + ROWS - 1) // ROWS - group * GROUP, GROUP)
    inside = inside % (GROUP * column_tiles)
    return expert, begin + (group * GROUP + inside % height) * ROWS, begin + size, inside // height


@triton.jit
def _row_index(token: tl.tensor, first: tl.tensor, end: tl.tensor, ROWS: tl.constexpr, GATHERED: tl.constexpr) -> tl.tensor:
    """Which rows of x a tile reads: [ROWS] int64. Rows past the expert's last repeat it; their results are not stored."""
    row = tl.minimum(first + tl.arange(0, ROWS), end - 1).to(tl.int64)
    if GATHERED:
        row = tl.load(token + row)
    return row


@triton.jit
def _row_tile(
    x: tl.tensor,
    x_box: tl.tensor,
    index: tl.tensor,
    first: tl.tensor,
    k: tl.tensor,
    depth: tl.tensor,
    DEPTH: tl.constexpr,
    BOXED: tl.constexpr,
) -> tl.tensor:
    """Columns k to k + DEPTH of a tile's rows: [ROWS, DEPTH], zeros past the last column."""
    if BOXED:
        values = x_box.load([first, k])
    else:
        column = k + tl.arange(0, DEPTH)
        pointer = x + index[:, None] * depth + column[None, :]
        values = tl.load(pointer, mask=column[None, :] < depth, other=0.0)
    return values


@triton.jit
def _weight_tile(
    w: tl.tensor,
    w_box: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    expert_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BOXED: tl.constexpr,
) -> tl.tensor:
    """[DEPTH, COLUMNS] of an expert's matrix, which lies in memory as [width, depth] if TRANSPOSED, else as [depth, width];
    ``expert_stride``: elements from one expert's matrix to the next."""
    if BOXED:
        values = w_box.load([expert, first, k]) if TRANSPOSED else w_box.load([expert, k, first])
        values = tl.trans(tl.reshape(values, [COLUMNS, DEPTH])) if TRANSPOSED else tl.reshape(values, [DEPTH, COLUMNS])
    else:
        row, column = k + tl.arange(0, DEPTH), first + tl.arange(0, COLUMNS)
        matrix = w + expert.to(tl.int64) * expert_stride
        offset = row[:, None] + column[None, :] * depth if TRANSPOSED else row[:, None] * width + column[None, :]
        values = tl.load(matrix + offset, mask=(row[:, None] < depth) & (column[None, :] < width), other=0.0)
    return values


@triton.jit
def _describe_rows(
    x: tl.tensor, num_rows: tl.tensor, depth: tl.tensor, ROWS: tl.constexpr, DEPTH: tl.constexpr, BOXED: tl.constexpr
) -> tl.tensor:
    """A descriptor of x [num_rows, depth], or x where the hardware has none."""
    box = x
    if BOXED:
        box = tl.make_tensor_descriptor(x, [num_rows, depth], [depth, 1], [ROWS, DEPTH])
    return box


@triton.jit
def _describe_weights(
    w: tl.tensor,
    num_experts: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    expert_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BOXED: tl.constexpr,
) -> tl.tensor:
    """A descriptor of all experts' matrices; a box never reaches into the next expert's."""
    box = w
    if BOXED:
        stride = tl.cast(expert_stride, tl.int64)
        if TRANSPOSED:
            box = tl.make_tensor_descriptor(w, [num_experts, width, depth], [stride, depth, 1], [1, COLUMNS, DEPTH])
        else:
            box = tl.make_tensor_descriptor(w, [num_experts, depth, width], [stride, width, 1], [1, DEPTH, COLUMNS])
    return box


@tuned("plain", ["width", "depth", "bucket", "TRANSPOSED"])
@triton.jit(do_not_specialize=["num_rows", "bucket"], do_not_specialize_on_alignment=["token", "counts", "scale"])
def _plain(
    x: tl.tensor,
    token: tl.tensor,
    w: tl.tensor,
    counts: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    bucket: tl.tensor,
    num_experts: tl.tensor,
    expert_stride: tl.tensor,
    SCALED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHERED: tl.constexpr,
    X_BOXED: tl.constexpr,
    W_BOXED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
    RESIDENT: tl.constexpr,
) -> None:
    DEPTH: tl.constexpr = DEPTH_BYTES // (x.dtype.element_ty.primitive_bitwidth // 8)
    x_box = _describe_rows(x, num_rows, depth, ROWS, DEPTH, X_BOXED)
    w_box = _describe_weights(w, num_experts, width, depth, expert_stride, COLUMNS, DEPTH, TRANSPOSED, W_BOXED)
    sizes = load_sizes(counts, num_experts, EXPERTS)
    column_tiles = tl.cdiv(width, COLUMNS)
    total = tl.sum((sizes + ROWS - 1) // ROWS, 0) * column_tiles
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, column_tile = _locate(tile, sizes, column_tiles, ROWS, GROUP, EXPERTS)
        index = _row_index(token, first, end, ROWS, GATHERED)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            left = _row_tile(x, x_box, index, first, k, depth, DEPTH, X_BOXED)
            right = _weight_tile(
                w, w_box, expert, column_tile * COLUMNS, k, width, depth, expert_stride, COLUMNS, DEPTH, TRANSPOSED, W_BOXED
            )
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        row, column = first + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
        if SCALED:
            sums *= tl.load(scale + row, mask=row < end, other=0.0)[:, None]
        inside = (row[:, None] < end) & (column[None, :] < width)
        tl.store(y + row[:, None].to(tl.int64) * width + column[None, :], sums.to(y.dtype.element_ty), mask=inside)


@tuned("activation", ["hidden", "depth", "bucket", "GATED"])
@triton.jit(do_not_specialize=["num_rows", "bucket"], do_not_specialize_on_alignment=["token", "counts"])
def _activation(
    x: tl.tensor,
    token: tl.tensor,
    w: tl.tensor,
    counts: tl.tensor,
    h: tl.tensor,
    a: tl.tensor,
    num_rows: tl.tensor,
    hidden: tl.tensor,
    depth: tl.tensor,
    bucket: tl.tensor,
    num_experts: tl.tensor,
    expert_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHERED: tl.constexpr,
    X_BOXED: tl.constexpr,
    W_BOXED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
    RESIDENT: tl.constexpr,
) -> None:
    DEPTH: tl.constexpr = DEPTH_BYTES // (x.dtype.element_ty.primitive_bitwidth // 8)
    width = hidden * (2 if GATED else 1)
    x_box = _describe_rows(x, num_rows, depth, ROWS, DEPTH, X_BOXED)
    w_box = _describe_weights(w, num_experts, width, depth, expert_stride, COLUMNS, DEPTH, True, W_BOXED)
    sizes = load_sizes(counts, num_experts, EXPERTS)
    column_tiles = tl.cdiv(hidden, COLUMNS)
    total = tl.sum((sizes + ROWS - 1) // ROWS, 0) * column_tiles
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, column_tile = _locate(tile, sizes, column_tiles, ROWS, GROUP, EXPERTS)
        index = _row_index(token, first, end, ROWS, GATHERED)
        first_column = column_tile * COLUMNS
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            left = _row_tile(x, x_box, index, first, k, depth, DEPTH, X_BOXED)
            right = _weight_tile(w, w_box, expert, first_column, k, width, depth, expert_stride, COLUMNS, DEPTH, True, W_BOXED)
            gate = tl.dot(left, right, gate, input_precision=PRECISION)
            if GATED:
                right = _weight_tile(w, w_box, expert, first_column + hidden, k, width, depth, expert_stride, COLUMNS, DEPTH, True, W_BOXED)
                up = tl.dot(left, right, up, input_precision=PRECISION)
        row, column = first + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        inside = (row[:, None] < end) & (column[None, :] < hidden)
        place = row[:, None].to(tl.int64)
        rounded = gate.to(h.dtype.element_ty)
        tl.store(h + place * width + column[None, :], rounded, mask=inside)
        value = activate(rounded.to(tl.float32), ACTIVATION)
        if GATED:
            rounded = up.to(h.dtype.element_ty)
            tl.store(h + place * width + hidden + column[None, :], rounded, mask=inside)
            value *= rounded.to(tl.float32)
        tl.store(a + place * hidden + column[None, :], value.to(a.dtype.element_ty), mask=inside)


@tuned("activation_backward", ["hidden", "depth", "bucket", "GATED"])
@triton.jit(do_not_specialize=["num_rows", "bucket"], do_not_specialize_on_alignment=["token", "counts", "weight"])
def _activation_backward(
    grad: tl.tensor,
    token: tl.tensor,
    w: tl.tensor,
    counts: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    grad_h: tl.tensor,
    weighted: tl.tensor,
    dots: tl.tensor,
    num_rows: tl.tensor,
    hidden: tl.tensor,
    depth: tl.tensor,
    bucket: tl.tensor,
    num_experts: tl.tensor,
    expert_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHERED: tl.constexpr,
    X_BOXED: tl.constexpr,
    W_BOXED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
    RESIDENT: tl.constexpr,
) -> None:
    DEPTH: tl.constexpr = DEPTH_BYTES // (grad.dtype.element_ty.primitive_bitwidth // 8)
    grad_box = _describe_rows(grad, num_rows, depth, ROWS, DEPTH, X_BOXED)
    w_box = _describe_weights(w, num_experts, hidden, depth, expert_stride, COLUMNS, DEPTH, False, W_BOXED)
    sizes = load_sizes(counts, num_experts, EXPERTS)
    column_tiles = tl.cdiv(hidden, COLUMNS)
    total = tl.sum((sizes + ROWS - 1) // ROWS, 0) * column_tiles
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, column_tile = _locate(tile, sizes, column_tiles, ROWS, GROUP, EXPERTS)
        index = _row_index(token, first, end, ROWS, GATHERED)
        grad_a = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            left = _row_tile(grad, grad_box, index, first, k, depth, DEPTH, X_BOXED)
            right = _weight_tile(w, w_box, expert, column_tile * COLUMNS, k, hidden, depth, expert_stride, COLUMNS, DEPTH, False, W_BOXED)
            grad_a = tl.dot(left, right, grad_a, input_precision=PRECISION)
        row = first + tl.arange(0, ROWS)
        factor = tl.load(weight + row, mask=row < end, other=0.0) if WEIGHTED else 1.0
        _through_activation(
            grad_a, h, factor, grad_h, weighted, dots, row, end, column_tile * COLUMNS, hidden, COLUMNS, ACTIVATION, GATED, WEIGHTED
        )


@triton.jit
def _through_activation(
    grad_a: tl.tensor,
    h: tl.tensor,
    factor: tl.tensor,
    grad_h: tl.tensor,
    weighted: tl.tensor,
    dots: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    hidden: tl.tensor,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """Stores grad_h, weighted and dots for some rows and columns."""
    if COLUMNS > PART:  # a part at a time: the whole would not fit in registers
        left, right = tl.split(tl.permute(tl.reshape(grad_a, [row.shape[0], 2, COLUMNS // 2]), [0, 2, 1]))
        _through_activation(
            left, h, factor, grad_h, weighted, dots, row, end, first_column, hidden, COLUMNS // 2, ACTIVATION, GATED, WEIGHTED
        )
        first_column += COLUMNS // 2
        _through_activation(
            right, h, factor, grad_h, weighted, dots, row, end, first_column, hidden, COLUMNS // 2, ACTIVATION, GATED, WEIGHTED
        )
    else:
        tl.static_assert(COLUMNS == PART)
        width = hidden * (2 if GATED else 1)
        column = first_column + tl.arange(0, COLUMNS)
        inside = (row[:, None] < end) & (column[None, :] < hidden)
        place = row[:, None].to(tl.int64)
        gate = tl.load(h + place * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        acted = activate(gate, ACTIVATION)
        value = acted
        if GATED:
            up = tl.load(h + place * width + hidden + column[None, :], mask=inside, other=0.0).to(tl.float32)
            value *= up
        if WEIGHTED:
            # masked entries of value are zero: every activation of zero is
            dot = dots + row.to(tl.int64) * tl.cdiv(hidden, PART) + first_column // PART
            tl.store(dot, tl.sum(grad_a * value, 1), mask=row < tl.where(first_column < hidden, end, 0))
            grad_a *= factor[:, None]
            value *= factor[:, None]
        tl.store(weighted + place * hidden + column[None, :], value.to(weighted.dtype.element_ty), mask=inside)
        slope = activation_slope(gate, ACTIVATION)
        if GATED:
            slope *= up
        tl.store(grad_h + place * width + column[None, :], (grad_a * slope).to(grad_h.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(grad_h + place * width + hidden + column[None, :], (grad_a * acted).to(grad_h.dtype.element_ty), mask=inside)
