"""Attention of many query heads over one key head, whose keys lie in slots.

Heads fold into the tokens: a tile takes M of the T * H queries of a row, which all look at the same keys, so that keys are
read once for all heads. With few queries the keys are divided over programs ("pieces"), and a second kernel puts the pieces
together. Pieces lie at fixed keys, so that a row's result does not depend on how long its neighbours are.

Keys and values come through tensor descriptors, so the copy engine brings whole blocks of them while the tensor cores work:
42 us became 28 for a prefix of 968 tokens on an H200. Blocks of keys that are all there are read without a mask, so that
values go from shared memory straight into the product; the last, partial block is masked.

Shapes: M queries of a tile, N keys read at a time, E head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _look(q, k, v, allowed, scale, acc, largest, weight):
    """One block of keys (N, E) and values (N, E); allowed (1, N) or (M, N).

    Keys that are not allowed count as if they were until a first allowed one comes: then what they gave fades to nothing.
    Where none comes, largest says so.
    """
    scores = tl.where(allowed, tl.dot(q, k.T, input_precision="ieee") * scale, -1e30)
    found = tl.maximum(largest, tl.max(scores, axis=1))
    p = tl.exp2(scores - found[:, None])
    faded = tl.exp2(largest - found)
    acc = tl.dot(p.to(v.dtype), v, acc * faded[:, None], input_precision="ieee")
    return acc, found, weight * faded + tl.sum(p, axis=1)


@triton.jit
def attend_kernel(
    q_ptr, keys, values, valid_ptr, out_ptr, lse_ptr, slots_ptr, seen_ptr, own_ptr,
    num_tokens, q_stride, capacity, valid_stride, scale,
    HEADS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    SEES_OWN: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last piece has the row's own keys too. With PIECES 1 out is (B, T, H, E), else it is
    (B, T * H, PIECES, E) float32, normed, with lse. keys, values: Descriptors over (slots * capacity, E) with blocks (N, E).
    scale: Of scores, in powers of two."""
    row = tl.program_id(2)
    piece = tl.program_id(1)
    is_last = piece == PIECES - 1
    query = tl.program_id(0) * M + tl.arange(0, M)
    token = query // HEADS
    there = token < num_tokens
    e = tl.arange(0, E)
    n = tl.arange(0, N)
    # Before the wait only what no kernel of this chain writes is read: these tables.
    slot = tl.load(slots_ptr + row)
    seen = tl.load(seen_ptr + row)
    own = tl.load(own_ptr + row)
    base = slot * capacity
    valid_at = valid_ptr + slot.to(tl.int64) * valid_stride + n
    q_at = q_ptr + (row * num_tokens + token)[:, None].to(tl.int64) * q_stride + (query % HEADS)[:, None] * E + e[None, :]
    begin = piece * PIECE
    end = tl.minimum(seen, begin + PIECE)
    whole = begin + tl.maximum(end - begin, 0) // N * N
    acc = tl.zeros((M, E), tl.float32)
    largest = tl.full((M,), -1e30, tl.float32)
    weight = tl.zeros((M,), tl.float32)
    if PDL:
        gdc_wait()
    q = tl.load(q_at, mask=there[:, None], other=0.0)
    for first in tl.range(begin, whole, N):
        allowed = tl.load(valid_at + first) != 0
        k = keys.load([base + first, 0])
        v = values.load([base + first, 0])
        acc, largest, weight = _look(q, k, v, allowed[None, :], scale, acc, largest, weight)
    if whole < end:
        # What lies behind the last key is another row's or an older one's; it may be no number.
        inside = whole + n < end
        allowed = inside & (tl.load(valid_at + whole, mask=inside, other=0) != 0)
        k = keys.load([base + whole, 0])
        v = tl.where(inside[:, None], values.load([base + whole, 0]), 0.0)
        acc, largest, weight = _look(q, k, v, allowed[None, :], scale, acc, largest, weight)
    if SEES_OWN:
        if is_last:
            for first in tl.range(0, num_tokens, N):
                inside = first + n < num_tokens
                allowed = inside[None, :]
                if CAUSAL:
                    allowed = allowed & (first + n[None, :] <= token[:, None])
                k = keys.load([base + own + first, 0])
                v = tl.where(inside[:, None], values.load([base + own + first, 0]), 0.0)
                acc, largest, weight = _look(q, k, v, allowed, scale, acc, largest, weight)
    if PDL:
        gdc_launch_dependents()
    result = acc / tl.maximum(weight, 1e-30)[:, None]
    flat = row * num_tokens * HEADS + query
    if PIECES == 1:
        out = out_ptr + flat[:, None].to(tl.int64) * E + e[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=there[:, None])
    else:
        lse = tl.where(largest > -1e29, largest + tl.log2(tl.maximum(weight, 1e-30)), -1e30)
        tl.store(lse_ptr + flat * PIECES + piece, lse, mask=there)
        if is_last | (begin < seen):
            out = out_ptr + (flat * PIECES + piece)[:, None].to(tl.int64) * E + e[None, :]
            tl.store(out, result.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, E: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr
):
    """The pieces of one query, weighed by their sums."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.arange(0, E)
    piece = tl.arange(0, PADDED)
    query = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + query * PIECES + piece, mask=piece < PIECES, other=-1e30)
    share = tl.where(lse > -1e29, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    share = share / tl.sum(share, axis=0)
    at = part_ptr + (query * PIECES + piece)[:, None] * E + e[None, :]
    part = tl.load(at, mask=(piece < PIECES)[:, None], other=0.0).to(tl.float32)
    # A piece without keys was never written: what lies there may be anything.
    part = tl.where((lse > -1e29)[:, None], part, 0.0)
    tl.store(out_ptr + query * E + e, tl.sum(part * share[:, None], axis=0).to(out_ptr.dtype.element_ty))
