"""Matrix products of few tokens. A kernel streams one weight matrix once and ends with what comes right after the product.

Their time is that of reading weights, and of starting. So work is cut small enough that every multiprocessor has some: where
the outputs are few, the inner sum is cut as well ("parts"), and the pass that norms the stream adds the parts up. With PDL
(programmatic dependent launch) a kernel starts while the one before ends, and waits where it needs its result.

Shapes: M tokens, N outputs of a tile, K inner numbers read at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_rows import RMS_EPS, entry_of, gelu


@triton.jit
def qkv_kernel(
    x_ptr, w_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, own_ptr, positions_ptr, total, num_tokens, pool_stride,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Projection and rotation; a tile has N numbers of the first half of a head, and their partners of the second."""
    per_head: tl.constexpr = HALF // N
    head = tl.program_id(0) // per_head
    column = (tl.program_id(0) % per_head) * N + tl.arange(0, N)
    first = head * 2 * HALF + column
    inner = tl.arange(0, K)
    at = tl.program_id(1) * M + tl.arange(0, M)
    there = at < total
    w_1 = w_ptr + first[None, :].to(tl.int64) * WIDTH + inner[:, None]
    w_2 = w_1 + HALF * WIDTH
    x = x_ptr + at[:, None] * WIDTH + inner[None, :]
    # What the end needs is looked up first: it depends on no kernel of the chain.
    row = at // num_tokens
    turned = there[:, None] & (head <= HEADS)  # Values are not rotated.
    angle = tl.load(positions_ptr + at, mask=there, other=0)[:, None] * HALF + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
    slot = tl.load(slots_ptr + row, mask=there, other=0).to(tl.int64)
    place = tl.load(own_ptr + row, mask=there, other=0) + at % num_tokens
    if PDL:
        gdc_wait()
    acc_1 = tl.zeros((M, N), tl.float32)
    acc_2 = tl.zeros((M, N), tl.float32)
    for begin in range(0, WIDTH, K):
        a = tl.load(x + begin, mask=there[:, None], other=0.0)
        acc_1 = tl.dot(a, tl.load(w_1 + begin), acc_1, input_precision="ieee")
        acc_2 = tl.dot(a, tl.load(w_2 + begin), acc_2, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if head < HEADS:
        out = q_ptr + at[:, None] * (HEADS * 2 * HALF) + first[None, :]
    else:
        inside = slot[:, None] * pool_stride + place[:, None] * (2 * HALF) + column[None, :]
        out = tl.where(head == HEADS, k_ptr, v_ptr) + inside
    tl.store(out, (acc_1 * cos - acc_2 * sin).to(q_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(out + HALF, (acc_2 * cos + acc_1 * sin).to(q_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def gate_up_kernel(
    x_ptr, w_ptr, out_ptr, total,
    WIDTH: tl.constexpr, MLP: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Both projections, gelu(gate) * up."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    at = tl.program_id(1) * M + tl.arange(0, M)
    there = at < total
    w_1 = w_ptr + column[None, :].to(tl.int64) * WIDTH + inner[:, None]
    w_2 = w_1 + MLP * WIDTH
    x = x_ptr + at[:, None] * WIDTH + inner[None, :]
    if PDL:
        gdc_wait()
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    for begin in range(0, WIDTH, K):
        a = tl.load(x + begin, mask=there[:, None], other=0.0)
        gate = tl.dot(a, tl.load(w_1 + begin), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(w_2 + begin), up, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    out = gelu(gate) * up
    tl.store(out_ptr + at[:, None] * MLP + column[None, :], out.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def parts_kernel(
    x_ptr, w_ptr, out_ptr, total, outputs,
    INNER: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Part p of the inner numbers gives out[p], (PARTS, total, outputs)."""
    length: tl.constexpr = INNER // PARTS
    part = tl.program_id(1)
    column = tl.program_id(0) * N + tl.arange(0, N)
    inside = column < outputs
    inner = part * length + tl.arange(0, K)
    at = tl.program_id(2) * M + tl.arange(0, M)
    there = at < total
    w = w_ptr + column[None, :].to(tl.int64) * INNER + inner[:, None]
    x = x_ptr + at[:, None] * INNER + inner[None, :]
    if PDL:
        gdc_wait()
    acc = tl.zeros((M, N), tl.float32)
    for begin in range(0, length, K):
        a = tl.load(x + begin, mask=there[:, None], other=0.0)
        acc = tl.dot(a, tl.load(w + begin, mask=inside[None, :], other=0.0), acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    out = out_ptr + (part * total + at)[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def expert_rows_kernel(
    slots_ptr, slot_positions, slot_keys, slot_clean, positions_ptr, seen_ptr, own_ptr, clean_ptr, num_tokens, own,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a pass through the expert looks up of a row, by its slot."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    token = tl.arange(0, BLOCK)
    tl.store(positions_ptr + row * num_tokens + token, tl.load(slot_positions + slot) + token, mask=token < num_tokens)
    tl.store(seen_ptr + row, tl.load(slot_keys + slot))
    tl.store(own_ptr + row, own)
    tl.store(clean_ptr + row, tl.load(slot_clean + slot))


@triton.jit
def action_in_kernel(
    actions_ptr, committed_ptr, w_ptr, bias_ptr, out_ptr, slots_ptr, clean_ptr, num_tokens, size,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, CLEAN: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The slots' actions, committed ones in place of those that are clean, to tokens; in float32."""
    row = tl.program_id(2)
    token = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    inner = tl.arange(0, SIZE)
    w = tl.load(w_ptr + column[None, :] * size + inner[:, None], mask=inner[:, None] < size, other=0.0)
    bias = tl.load(bias_ptr + column)
    if PDL:
        # In this order: kernels behind it read tables that the one in front of it writes before they wait themselves.
        gdc_wait()
        gdc_launch_dependents()
    there = token < num_tokens
    inside = there[:, None] & (inner[None, :] < size)
    place = (tl.load(slots_ptr + row) * num_tokens + token)[:, None] * size + inner[None, :]
    actions = tl.load(actions_ptr + place, mask=inside, other=0.0)
    if CLEAN:
        is_clean = (token < tl.load(clean_ptr + row))[:, None]
        actions = tl.where(is_clean, tl.load(committed_ptr + place, mask=inside, other=0.0), actions)
    out = tl.dot(actions, w, input_precision="ieee") + bias[None, :]
    at = row * num_tokens + token
    tl.store(out_ptr + at[:, None] * WIDTH + column[None, :], out.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def action_out_kernel(
    x_ptr, parts_ptr, gate_ptr, scale_ptr, shift_ptr, w_ptr, bias_ptr, actions_ptr, committed_ptr, pull_ptr, times_ptr,
    guidance_ptr, slots_ptr, steps_ptr, clean_ptr, num_tokens, size, last, part_stride,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, CLEAN: tl.constexpr, PDL: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Of one token: what is pending, final norm, velocity, guidance, one Euler step; in float32."""
    at = tl.program_id(0)
    row = at // num_tokens
    token = at % num_tokens
    action = tl.arange(0, SIZE)
    real = action < size
    inner = tl.arange(0, K)
    if PDL:
        gdc_wait()
    step = tl.load(steps_ptr + row)
    slot = tl.load(slots_ptr + row)
    entry = entry_of(at, num_tokens, steps_ptr, clean_ptr, last, True, CLEAN) * WIDTH
    squares = tl.zeros((K,), tl.float32)
    for begin in tl.static_range(0, WIDTH, K):
        x = tl.load(x_ptr + at * WIDTH + begin + inner).to(tl.float32)
        if PARTS > 0:
            branch = tl.zeros((K,), tl.float32)
            for part in tl.static_range(PARTS):
                branch += tl.load(parts_ptr + part * part_stride + at * WIDTH + begin + inner).to(tl.float32)
            x += branch * tl.load(gate_ptr + entry + begin + inner)
            tl.store(x_ptr + at * WIDTH + begin + inner, x.to(x_ptr.dtype.element_ty))
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + RMS_EPS)
    if PARTS > 0:
        tl.debug_barrier()
    products = tl.zeros((SIZE, K), tl.float32)
    for begin in range(0, WIDTH, K):
        x = tl.load(x_ptr + at * WIDTH + begin + inner).to(tl.float32)
        normed = x * inverse * tl.load(scale_ptr + entry + begin + inner) + tl.load(shift_ptr + entry + begin + inner)
        w = tl.load(w_ptr + action[:, None] * WIDTH + begin + inner[None, :], mask=real[:, None], other=0.0)
        products += w * normed[None, :]
    v = tl.sum(products, axis=1) + tl.load(bias_ptr + action, mask=real, other=0.0)
    place = (slot * num_tokens + token) * size + action
    actions = tl.load(actions_ptr + place, mask=real, other=0.0)
    committed = tl.load(committed_ptr + place, mask=real, other=0.0)
    is_clean = False
    if CLEAN:
        is_clean = token < tl.load(clean_ptr + row)
        actions = tl.where(is_clean, committed, actions)
    error = (committed - (actions - tl.load(times_ptr + step) * v)) * tl.load(pull_ptr + slot * num_tokens + token)
    v -= tl.load(guidance_ptr + step) * error
    moved = actions - v / last
    if CLEAN:
        moved = tl.where(is_clean, committed, moved)
    tl.store(actions_ptr + place, moved, mask=real)
