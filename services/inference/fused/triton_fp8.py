"""What stands before a product in FP8: its tokens are quantised, each by the largest of its numbers. One program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_rows import gelu


@triton.jit
def store_quantized(x, out_ptr, scale_ptr, at, column, SIZE: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """x: float32 numbers of token at, 0 beyond SIZE. The conversion saturates and keeps what is not a number, so values need
    no bounds of their own, which would hide such a one."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, SMALLEST)
    quantized = (x * (1.0 / scale)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * SIZE + column, quantized, mask=column < SIZE)
    tl.store(scale_ptr + at, scale)


@triton.jit
def quantize_kernel(
    x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + at * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    store_quantized(x, out_ptr, scale_ptr, at, column, SIZE, LARGEST, SMALLEST)


@triton.jit
def gelu_mul_quantize_kernel(
    gate_up_ptr, out_ptr, scale_ptr, MLP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """gelu(gate) * up, which goes into its scale and values without being rounded in between."""
    at = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < MLP
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up_ptr + at * (2 * MLP) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at * (2 * MLP) + MLP + column, mask=inside, other=0.0).to(tl.float32)
    store_quantized(gelu(gate) * up, out_ptr, scale_ptr, at, column, MLP, LARGEST, SMALLEST)
