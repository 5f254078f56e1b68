"""What stands between two matrix products: residuals and norms, rotation, gelu * up. One pass each, one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

RMS_EPS = tl.constexpr(1e-6)
LAYER_NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def gelu(x):
    """By tanh, as sigmoid: x * sigmoid(2 y) is x / 2 * (1 + tanh y)."""
    return x * tl.sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))


@triton.jit
def entry_of(at, num_tokens, steps_ptr, clean_ptr, last, STEPS: tl.constexpr, CLEAN: tl.constexpr):
    """The table entry of token at."""
    step = 0
    if STEPS:
        row = at // num_tokens
        step = tl.load(steps_ptr + row)
        if CLEAN:
            step = tl.where(at % num_tokens < tl.load(clean_ptr + row), last, step)
    return step


@triton.jit
def norm_kernel(
    x_ptr, parts_ptr, gate_ptr, scale_ptr, shift_ptr, steps_ptr, clean_ptr, out_ptr, num_tokens, last, part_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, SHIFTED: tl.constexpr,
    STEPS: tl.constexpr, CLEAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += gate * the sum of PARTS parts, and out = norm of that."""
    at = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = at.to(tl.int64) * WIDTH + column
    entry = entry_of(at, num_tokens, steps_ptr, clean_ptr, last, STEPS, CLEAN) * WIDTH + column
    scale = tl.load(scale_ptr + entry, mask=inside, other=0.0)
    if SHIFTED:
        shift = tl.load(shift_ptr + entry, mask=inside, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + entry, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            branch += tl.load(parts_ptr + part * part_stride + here, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch *= gate
        x += branch
        tl.store(x_ptr + here, x.to(x_ptr.dtype.element_ty), mask=inside)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + RMS_EPS) * scale
    if SHIFTED:
        out += shift
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, own_ptr, positions_ptr, num_tokens, pool_stride,
    HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one token: queries are rotated where they are, keys and values go into the slots. HEADS 0: no queries."""
    at = tl.program_id(0)
    row = at // num_tokens
    head = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < HEADS + 2) & (column < HALF)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    start = qkv_ptr + at.to(tl.int64) * ((HEADS + 2) * 2 * HALF) + head * (2 * HALF) + column
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(positions_ptr + at) * HALF + column
    turned = inside & (head <= HEADS)
    cos = tl.load(cos_ptr + angle + head * 0, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angle + head * 0, mask=turned, other=0.0)
    out_1 = (first * cos - second * sin).to(qkv_ptr.dtype.element_ty)
    out_2 = (second * cos + first * sin).to(qkv_ptr.dtype.element_ty)
    place = tl.load(slots_ptr + row).to(tl.int64) * pool_stride
    place += (tl.load(own_ptr + row) + at % num_tokens) * (2 * HALF)
    into = tl.where(head == HEADS, k_ptr, v_ptr) + place + column
    into = tl.where(head < HEADS, start, into)
    tl.store(into, out_1, mask=inside)
    tl.store(into + HALF, out_2, mask=inside)


@triton.jit
def gelu_mul_kernel(gate_up_ptr, out_ptr, MLP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < MLP
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up_ptr + at * (2 * MLP) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at * (2 * MLP) + MLP + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at * MLP + column, (gelu(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_layer_norm_kernel(
    x_ptr, branch_ptr, branch_bias_ptr, weight_ptr, bias_ptr, out_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (float32) += branch + its bias, and the LayerNorm of that."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = tl.program_id(0).to(tl.int64) * WIDTH + column
    # All loads first: a reduction would hold back what comes after it.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + here, mask=inside, other=0.0)
    if BRANCH:
        x += tl.load(branch_ptr + here, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
        tl.store(x_ptr + here, x, mask=inside)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + LAYER_NORM_EPS)
    out = out * weight + bias
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=inside)
