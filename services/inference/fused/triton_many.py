"""Matrix products of many tokens that end with more than a product.

Persistent programs, one a multiprocessor; the copy engine brings tiles through tensor descriptors. cuBLAS multiplies
faster, but leaves a pass of its own behind: where that pass reads as much as a prefix's gate and up, one kernel wins, 189 us
a layer against 177 + 25 on an H200.

Shapes: M tokens, N outputs of a tile, K inner numbers read at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import gelu


@triton.jit
def gate_up_many_kernel(
    x, w, out, total,
    WIDTH: tl.constexpr, MLP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """gelu(gate) * up. x, w, out: Descriptors over (total, WIDTH), (2 * MLP, WIDTH) and (total, MLP) with blocks (M, K),
    (N, K) and (M, N). GROUP: Tiles of tokens that share the weights that are in the cache."""
    tiles_m = tl.cdiv(total, M)
    tiles_n: tl.constexpr = MLP // N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        first = tile // (GROUP * tiles_n) * GROUP
        size = tl.minimum(tiles_m - first, GROUP)
        at = (first + tile % (GROUP * tiles_n) % size) * M
        column = tile % (GROUP * tiles_n) // size * N
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        for begin in range(0, WIDTH, K):
            a = x.load([at, begin])
            gate = tl.dot(a, w.load([column, begin]).T, gate, input_precision="ieee")
            up = tl.dot(a, w.load([MLP + column, begin]).T, up, input_precision="ieee")
        out.store([at, column], (gelu(gate) * up).to(out.dtype))
