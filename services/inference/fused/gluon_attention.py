"""Attention of hundreds of queries over one key head, whose keys lie in slots: a prefix, and Euler steps of several rows.

What triton_attention.py does with few queries, in Gluon, which says who waits for what: two warpgroups take 64 queries each
and share the keys that the copy engine brings. They run apart by themselves: while one weighs its scores, the tensor cores
multiply for the other (the idea of FlashAttention-3, arXiv:2407.08608). For four prefixes of 968 tokens this takes 61 us a
layer on an H200, and took 79 us with the same tiles in Triton.

Gluon is experimental and changes with Triton's versions: run with 3.6 (torch 2.11), compiled with 3.7, 3.8 and 3.9 as well.

Heads fold into the tokens: a tile takes M / HEADS tokens with all their heads, so that keys are read once for all. Keys can
be divided over programs ("pieces") at fixed keys, so that a row's result does not depend on how long its neighbours are;
combine_kernel puts the pieces together.

Shapes: M queries of a warpgroup, N keys read at a time, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# By the names of Triton 3.9, and of those before it.
_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Blocks of keys, and of values, that there is room for: one to multiply with and one to come.
STAGES = gl.constexpr(2)
# Lower than every score: what may not be seen gets it.
LOWEST = gl.constexpr(-1e30)


@gluon.jit
def _wait_for_kernel_before():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_kernel_behind_start():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _block(number, keys_of, N: gl.constexpr, SEES_OWN: gl.constexpr):
    """Where a block of keys begins in its slot, where its keys end, and whether they are the row's own, which come last."""
    _, begin, end, blocks, _, own, num_tokens = keys_of
    first, limit, is_own = begin + number * N, end, number < 0
    if SEES_OWN:
        is_own = number >= blocks
        first = gl.where(is_own, own + (number - blocks) * N, first)
        limit = gl.where(is_own, own + num_tokens, limit)
    return first, limit, is_own


@gluon.jit
def _allowed(valid_at, n, first, limit, is_own):
    """(N,) whether the keys of a block may be seen: valid ones, and a row's own."""
    inside = first + n < limit
    return inside & (is_own | (gl.load(valid_at + first + n, mask=inside, other=0) != 0))


@gluon.jit
def _bring(number, there, pool, into, full, keys_of, SEES_OWN: gl.constexpr):
    """Block number of keys or values, where there is one, into its place of STAGES, which must be free."""
    first, _, _ = _block(number, keys_of, pool.block_shape[0], SEES_OWN)
    stage = number % STAGES
    mbarrier.expect(full.index(stage), pool.block_type.nbytes, pred=there)
    _async_load(pool, [keys_of[0] + first, 0], full.index(stage), into.index(stage), pred=there)


@gluon.jit
def _bring_next(number, pool, into, full, empty, keys_of, SEES_OWN: gl.constexpr):
    """_bring() as soon as both warpgroups are done with what lies in its place."""
    there = number < keys_of[4]
    mbarrier.wait(empty.index(number % STAGES), ((number // STAGES) & 1) ^ 1, pred=there)
    _bring(number, there, pool, into, full, keys_of, SEES_OWN)


@gluon.jit
def _look(
    WHICH: gl.constexpr, pools, places, barriers, keys_of, rest,
    HEADS: gl.constexpr, E: gl.constexpr, M: gl.constexpr, N: gl.constexpr, PIECES: gl.constexpr, SEES_OWN: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One warpgroup's queries over all keys of the piece. Warpgroup 0 has the keys brought for both."""
    q, keys, values, out = pools
    q_place, k_place, v_place = places
    q_full, k_full, v_full, k_empty, v_empty = barriers
    _, _, _, blocks, num, _, num_tokens = keys_of
    row, piece, valid_at, lse_ptr, scale = rest
    of_scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    begin_query = (gl.program_id(0) * 2 + WHICH) * M
    # Keys of a row's prefix lie there since long; its own, and all of a prefix itself, come from the kernel before.
    early = 0
    if SEES_OWN:
        early = blocks
    if WHICH == 0:
        for number in gl.static_range(STAGES):
            _bring(number, number < early, keys, k_place, k_full, keys_of, SEES_OWN)
            if number < STAGES - 1:
                _bring(number, number < early, values, v_place, v_full, keys_of, SEES_OWN)
    if PDL:
        _wait_for_kernel_before()
    mbarrier.expect(q_full.index(WHICH), q.block_type.nbytes)
    _async_load(q, [row, begin_query // HEADS, 0, 0], q_full.index(WHICH), q_place.index(WHICH))
    if WHICH == 0:
        for number in gl.static_range(STAGES):
            _bring(number, (number >= early) & (number < num), keys, k_place, k_full, keys_of, SEES_OWN)
            if number < STAGES - 1:
                _bring(number, (number >= early) & (number < num), values, v_place, v_full, keys_of, SEES_OWN)

    mine = q_place.index(WHICH).reshape([M, E])
    n = gl.arange(0, N, gl.SliceLayout(0, of_scores))
    n_by_lane = gl.arange(0, N, gl.BlockedLayout([N // 32], [32], [4], [0]))
    largest = gl.full([M], LOWEST, gl.float32, gl.SliceLayout(1, of_scores))
    weight = gl.zeros([M], gl.float32, gl.SliceLayout(1, of_scores))
    none = gl.zeros([M, N], gl.float32, of_scores)
    adding = warpgroup_mma_init(gl.zeros([M, E], gl.float32, of_sums))
    mbarrier.wait(q_full.index(WHICH), 0)
    for number in range(num):
        stage = number % STAGES
        turn = (number // STAGES) & 1
        first, limit, is_own = _block(number, keys_of, N, SEES_OWN)
        # Most blocks may be seen whole: then nobody looks key by key.
        all_open = gl.min(_allowed(valid_at, n_by_lane, first, limit, is_own).to(gl.int32), axis=0)
        mbarrier.wait(k_full.index(stage), turn)
        multiplying = warpgroup_mma(mine, k_place.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        sums, scores = warpgroup_mma_wait(0, deps=[adding, multiplying])
        mbarrier.arrive(v_empty.index((number + STAGES - 1) % STAGES), count=1, pred=number > 0)
        mbarrier.arrive(k_empty.index(stage), count=1)
        if all_open == 0:
            scores = gl.where(_allowed(valid_at, n, first, limit, is_own)[None, :], scores, LOWEST)
        found = gl.maximum(largest, gl.max(scores, axis=1))
        # As long as no key was allowed, what is lowest must weigh nothing, not as much as the largest.
        above = gl.where(found > 0.1 * LOWEST, found * scale, 0.0)
        p = gl.exp2(scores * scale - above[:, None])
        faded = gl.exp2((largest - found) * scale)
        weight = weight * faded + gl.sum(p, axis=1)
        largest = found
        sums = sums * gl.convert_layout(faded, gl.SliceLayout(1, of_sums))[:, None]
        if WHICH == 0:
            _bring_next(number + STAGES - 1, values, v_place, v_full, v_empty, keys_of, SEES_OWN)
            _bring_next(number + STAGES, keys, k_place, k_full, k_empty, keys_of, SEES_OWN)
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, of_sums, 2))
        mbarrier.wait(v_full.index(stage), turn)
        adding = warpgroup_mma(p, v_place.index(stage), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[adding])
    if PDL:
        _let_kernel_behind_start()

    # Nobody needs the queries any more: their place is where the result leaves from.
    mine.store((sums / gl.convert_layout(gl.maximum(weight, 1e-30), gl.SliceLayout(1, of_sums))[:, None]).to(gl.bfloat16))
    fence_async_shared()
    _async_store(out, [row, begin_query, piece * E], mine.reshape([1, M, E]))
    if PIECES > 1:
        query = begin_query + gl.arange(0, M, gl.SliceLayout(1, of_scores))
        lse = gl.where(largest > 0.1 * LOWEST, largest * scale + gl.log2(gl.maximum(weight, 1e-30)), LOWEST)
        # Scores that are no numbers are no largest ones; they must not look like a piece without keys.
        lse = gl.where(weight == weight, lse, float("nan"))
        gl.store(lse_ptr + (row * num_tokens * HEADS + query) * PIECES + piece, lse, mask=query < num_tokens * HEADS)
    tma.store_wait(0)


@gluon.jit
def attend_many_kernel(
    q, keys, values, out, lse_ptr, valid_ptr, slots_ptr, seen_ptr, own_ptr,
    keys_of_piece, num_tokens, capacity, valid_stride, scale,
    HEADS: gl.constexpr, E: gl.constexpr, M: gl.constexpr, N: gl.constexpr, PIECES: gl.constexpr, SEES_OWN: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The last piece has the row's own keys too.

    q, keys, values, out: Descriptors over (B, T, HEADS, E) with blocks (1, M / HEADS, HEADS, E), over (slots * capacity, E)
    with blocks (N, E), and over (B, T * HEADS, PIECES * E) with blocks (1, M, E). lse_ptr: (B, T * HEADS, PIECES), of use
    where there are several pieces. scale: Of scores, in powers of two.
    """
    row = gl.program_id(2)
    piece = gl.program_id(1)
    # Before the wait only what no kernel of this chain writes is read: these tables.
    slot = gl.load(slots_ptr + row)
    seen = gl.load(seen_ptr + row)
    own = gl.load(own_ptr + row)
    valid_at = valid_ptr + slot.to(gl.int64) * valid_stride
    begin = piece * keys_of_piece
    end = gl.minimum(seen, begin + keys_of_piece)
    blocks = gl.cdiv(gl.maximum(end - begin, 0), N)
    num = blocks
    if SEES_OWN:
        num += gl.where(piece == PIECES - 1, gl.cdiv(num_tokens, N), 0)
    keys_of = (slot * capacity, begin, end, blocks, num, own, num_tokens)
    q_place = gl.allocate_shared_memory(gl.bfloat16, [2, 1, M // HEADS, HEADS, E], q.layout)
    k_place = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, E], keys.layout)
    v_place = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, E], values.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(2):
        mbarrier.init(q_full.index(at), count=1)
    for at in gl.static_range(STAGES):
        mbarrier.init(k_full.index(at), count=1)
        mbarrier.init(v_full.index(at), count=1)
        mbarrier.init(k_empty.index(at), count=2)
        mbarrier.init(v_empty.index(at), count=2)
    pools = (q, keys, values, out)
    places = (q_place, k_place, v_place)
    barriers = (q_full, k_full, v_full, k_empty, v_empty)
    rest = (row, piece, valid_at, lse_ptr, scale)
    gl.warp_specialize(
        [
            (_look, (0, pools, places, barriers, keys_of, rest, HEADS, E, M, N, PIECES, SEES_OWN, PDL)),
            (_look, (1, pools, places, barriers, keys_of, rest, HEADS, E, M, N, PIECES, SEES_OWN, PDL)),
        ],
        [4],
        [240],
    )


def descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    """Of a tensor that the copy engine brings, or takes, in such blocks."""
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout(128, 8 * tensor.element_size(), len(block)))
