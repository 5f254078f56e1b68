"""Attention over one key head, whose keys lie in slots: of text, drafts and Euler steps of one or two rows, and of whatever
gluon_attention.py does not take.

Heads fold into the tokens: a tile takes M of the T * H queries of a row, which all look at the same keys, so that keys are
read once for all heads. Where queries are few, keys are divided over programs ("pieces"), and a second kernel puts the
pieces together. Pieces lie at fixed keys, so that a row's result does not depend on how long its neighbours are.

Keys and values come through tensor descriptors, so the copy engine brings whole blocks of them while the tensor cores work.
Values go from shared memory straight into the product: scores are masked, and no values. So what lies in a slot behind its
last key, another row's or an older one's, must be finite (Slots.wipe()).

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
def _block(number, begin, end, blocks, own, num_tokens, N: tl.constexpr, SEES_OWN: tl.constexpr):
    """Where a block of keys begins in its slot, where its keys end, and whether they are the row's own, which come last."""
    is_own = (number >= blocks) & SEES_OWN
    first = tl.where(is_own, own + (number - blocks) * N, begin + number * N)
    return first, tl.where(is_own, own + num_tokens, end), is_own


@triton.jit
def _allowed(valid_at, n, first, limit, is_own):
    """(N,) whether the keys of a block may be seen: valid ones, and a row's own."""
    inside = first + n < limit
    return inside & (is_own | (tl.load(valid_at + first, mask=inside, other=0) != 0))


@triton.jit
def attend_kernel(
    q_ptr, keys, values, valid_ptr, out_ptr, lse_ptr, slots_ptr, seen_ptr, own_ptr,
    q_stride, num_tokens, capacity, valid_stride, scale,
    HEADS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    SEES_OWN: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last piece has the row's own keys too. With PIECES 1 out is (B, T, H, E), else it is
    (B, T * H, PIECES, E), normed, with lse. keys, values: Descriptors over (slots * capacity, E) with blocks (N, E).
    scale: Of scores, in powers of two."""
    row = tl.program_id(2)
    piece = tl.program_id(1)
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
    blocks = tl.cdiv(tl.maximum(end - begin, 0), N)
    num = blocks
    if SEES_OWN:
        num += tl.where(piece == PIECES - 1, tl.cdiv(num_tokens, N), 0)
    acc = tl.zeros((M, E), tl.float32)
    largest = tl.full((M,), -1e30, tl.float32)
    weight = tl.zeros((M,), tl.float32)
    first, limit, is_own = _block(0, begin, end, blocks, own, num_tokens, N, SEES_OWN)
    # Looked up one block ahead, or every block would wait for memory here.
    allowed = _allowed(valid_at, n, first, limit, is_own)
    if PDL:
        gdc_wait()
    q = tl.load(q_at, mask=there[:, None], other=0.0)
    for number in tl.range(0, num):
        first, limit, is_own = _block(number, begin, end, blocks, own, num_tokens, N, SEES_OWN)
        k = keys.load([base + first, 0])
        v = values.load([base + first, 0])
        now = allowed[None, :]
        if CAUSAL:
            now = now & ((number < blocks) | (first - own + n[None, :] <= token[:, None]))
        first, limit, is_own = _block(number + 1, begin, end, blocks, own, num_tokens, N, SEES_OWN)
        allowed = _allowed(valid_at, n, first, limit, is_own)
        acc, largest, weight = _look(q, k, v, now, scale, acc, largest, weight)
    if PDL:
        gdc_launch_dependents()
    result = acc / tl.maximum(weight, 1e-30)[:, None]
    flat = row * num_tokens * HEADS + query
    if PIECES == 1:
        out = out_ptr + flat[:, None].to(tl.int64) * E + e[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=there[:, None])
    else:
        lse = tl.where(largest > -1e29, largest + tl.log2(tl.maximum(weight, 1e-30)), -1e30)
        # Scores that are no numbers are no largest ones; they must not look like a piece without keys.
        lse = tl.where(weight == weight, lse, float("nan"))
        tl.store(lse_ptr + flat * PIECES + piece, lse, mask=there)
        if num > 0:
            out = out_ptr + (flat * PIECES + piece)[:, None].to(tl.int64) * E + e[None, :]
            tl.store(out, result.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, total,
    E: tl.constexpr, PIECES: tl.constexpr, QUERIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The pieces of a few queries, weighed by their sums."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    there = query < total
    e = tl.arange(0, E)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    largest = tl.full((QUERIES,), -1e30, tl.float32)
    for piece in tl.static_range(PIECES):
        largest = tl.maximum(largest, tl.load(lse_ptr + query * PIECES + piece, mask=there, other=-1e30))
    acc = tl.zeros((QUERIES, E), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    for piece in tl.static_range(PIECES):
        lse = tl.load(lse_ptr + query * PIECES + piece, mask=there, other=-1e30)
        # A piece without keys was never written: what lies there may be anything. One that is no number was.
        written = (lse > -1e29) | (lse != lse)
        share = tl.where(written, tl.exp2(lse - largest), 0.0)
        at = part_ptr + (query * PIECES + piece)[:, None].to(tl.int64) * E + e[None, :]
        acc += share[:, None] * tl.load(at, mask=written[:, None], other=0.0).to(tl.float32)
        weight += share
    out = (acc / tl.maximum(weight, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query[:, None].to(tl.int64) * E + e[None, :], out, mask=there[:, None])
