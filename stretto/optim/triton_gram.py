"""x xᵀ on CUDA for about half the products: tiles on and below the diagonal, each stored a second time mirrored.

Imported only where triton is there and a tensor lies on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((128, 64, 8, 3), (128, 32, 4, 4), (64, 64, 4, 4), (64, 32, 4, 3))  # rows, depth, warps, stages


@triton.autotune(
    configs=[
        triton.Config({"TILE": tile, "DEPTH": depth}, num_warps=warps, num_stages=stages)
        for tile, depth, warps, stages in TILES
    ],
    key=["m", "n"],
)
@triton.jit
def _half_tiles(  # type: ignore[no-untyped-def]  # triton reads annotations
    x,
    added,
    out,
    m,
    n,
    x_matrix,
    x_row,
    x_column,
    added_matrix,
    added_row,
    added_column,
    beta,
    alpha,
    HAS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[i, j] = out[j, i] = beta added[i, j] + alpha Σ_l x[i, l] x[j, l] for one tile with i >= j."""
    side = (m + TILE - 1) // TILE
    pairs = side * (side + 1) // 2
    matrix = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    # pair = down (down + 1) / 2 + across; the square root may be off by one
    down = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    down = tl.where(down * (down + 1) // 2 > pair, down - 1, down)
    down = tl.where((down + 1) * (down + 2) // 2 <= pair, down + 1, down)
    across = pair - down * (down + 1) // 2

    rows = (down * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (across * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    x += matrix * x_matrix
    left = x + rows[:, None] * x_row + depth[None, :] * x_column
    right = x + columns[None, :] * x_row + depth[:, None] * x_column
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, n, DEPTH):
        inside = depth < n - start
        a = tl.load(left, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=(columns < m)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH * x_column
        right += DEPTH * x_column

    total *= alpha
    lower = (rows[:, None] >= columns[None, :]) & (rows < m)[:, None]
    if HAS_ADDED:
        spot = added + matrix * added_matrix + rows[:, None] * added_row + columns[None, :] * added_column
        total += beta * tl.load(spot, mask=lower, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += matrix * m * m
    tl.store(out + rows[:, None] * m + columns[None, :], result, mask=lower)
    mirrored = (rows[None, :] > columns[:, None]) & (rows < m)[None, :]
    tl.store(out + columns[:, None] * m + rows[None, :], tl.trans(result), mask=mirrored)


def half_tile_gram(
    x: Tensor, added: Tensor | None = None, *, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """beta added + alpha x xᵀ, exactly symmetric: x (K, m, n), added (K, m, m) symmetric -> (K, m, m).

    bfloat16, float16 or float32 with any strides; sums in float32, the result in x's dtype. float32 is rounded
    to tf32 where torch's matmul precision allows that.
    """
    count, m, n = x.shape
    out = torch.empty(count, m, m, dtype=x.dtype, device=x.device)
    other = x if added is None else added

    def grid(meta: dict[str, Any]) -> tuple[int]:
        side = triton.cdiv(m, meta["TILE"])
        return (count * side * (side + 1) // 2,)

    _half_tiles[grid](
        x,
        other,
        out,
        m,
        n,
        *x.stride(),
        *other.stride(),
        beta,
        alpha,
        HAS_ADDED=added is not None,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )
    return out
