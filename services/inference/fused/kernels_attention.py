"""How attention is cut, and called. Shapes: B rows, T tokens of a row, H heads, E head size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_attention
from .slots import Rows, Slots

MULTIPROCESSORS = 132
# Queries whose pieces one program puts together where there are many; else one.
COMBINED_TOGETHER, MANY_QUERIES = 4, 256
# From so many queries of all rows on, three rows of a chunk, two warpgroups share keys. They take so many queries each, and
# so many keys at a time.
SHARING_FROM, SHARING_QUERIES, SHARING_KEYS = 1200, 64, 64


@dataclass(frozen=True)
class AttendTile:
    """Queries and keys of a tile, warps, stages, and about how many programs there should be in all; 0: each looks at all
    keys itself."""

    m: int
    n: int
    warps: int
    stages: int
    programs: int = 0


# By the most queries of all rows, after those of text; found by trying on one H200.
ATTEND_TILES = {
    400: AttendTile(32, 128, 4, 2, MULTIPROCESSORS),
    800: AttendTile(64, 64, 4, 3, MULTIPROCESSORS),
    1600: AttendTile(64, 32, 4, 2, 2 * MULTIPROCESSORS),
    3200: AttendTile(64, 64, 4, 3, MULTIPROCESSORS),
}


def attend(q: torch.Tensor, rows: Rows, slots: Slots, layer: int, launch: Mapping[str, Any]) -> torch.Tensor:
    """(B, T, H, E) queries, tokens possibly apart, to (B, T, H * E). launch: How kernels are started."""
    num_rows, num_tokens, heads, size = q.shape
    queries = num_tokens * heads
    shares, tile = _shares(q, rows), tile_of(num_rows, queries)
    m, n, programs = (2 * SHARING_QUERIES, SHARING_KEYS, MULTIPROCESSORS) if shares else (tile.m, tile.n, tile.programs)
    tiles = triton.cdiv(queries, m)
    # Many tokens that do not see keys of their own are a prefix, which looks back at itself.
    most = slots.sizes.text_capacity if rows.sees_own or not shares else num_tokens
    piece, pieces = cut_keys(most, tiles * num_rows, n, programs)
    mixed = torch.empty(num_rows, num_tokens, heads * size, dtype=q.dtype, device=q.device)
    part, lse = mixed.view(num_rows, queries, size), mixed
    if pieces > 1:
        part = torch.empty(num_rows, queries, pieces * size, dtype=q.dtype, device=q.device)
        lse = torch.empty(num_rows, queries, pieces, dtype=torch.float32, device=q.device)
    cut = {"HEADS": heads, "E": size, "N": n, "PIECES": pieces, "SEES_OWN": rows.sees_own}
    sizes = (num_tokens, slots.keys.shape[2], slots.valid.stride(0), size**-0.5 * math.log2(math.e))
    pools = [pool[layer].view(-1, size) for pool in (slots.keys, slots.values)]
    if shares:
        from . import gluon_attention  # Experimental in Triton: nobody else shall depend on it.

        of_q, of_keys, of_values, of_part = (
            gluon_attention.descriptor(tensor, block)
            for tensor, block in (
                (q, [1, SHARING_QUERIES // heads, heads, size]), *((pool, [n, size]) for pool in pools),
                (part, [1, SHARING_QUERIES, size]),
            )
        )  # fmt: skip
        gluon_attention.attend_many_kernel[(tiles, pieces, num_rows)](
            of_q, of_keys, of_values, of_part, lse, slots.valid, rows.slots, rows.seen, rows.own, piece, *sizes,
            M=SHARING_QUERIES, num_warps=4, **cut, **launch,
        )  # fmt: skip
    else:
        keys, values = (TensorDescriptor.from_tensor(pool, [n, size]) for pool in pools)
        triton_attention.attend_kernel[(tiles, pieces, num_rows)](
            q, keys, values, slots.valid, part, lse, rows.slots, rows.seen, rows.own, q.stride(1), *sizes,
            M=m, PIECE=piece, CAUSAL=rows.causal, num_warps=tile.warps, num_stages=tile.stages, **cut, **launch,
        )  # fmt: skip
    if pieces > 1:
        together = 1 if num_rows * queries < MANY_QUERIES else COMBINED_TOGETHER
        triton_attention.combine_kernel[(triton.cdiv(num_rows * queries, together),)](
            part, lse, mixed, num_rows * queries, E=size, PIECES=pieces, QUERIES=together, num_warps=4, **launch
        )
    return mixed


def _shares(q: torch.Tensor, rows: Rows) -> bool:
    """Whether attend_many_kernel takes them: many of each row, of a kind that it is made for, on Hopper, whose instructions
    it has."""
    num_rows, num_tokens, heads, size = q.shape
    queries = num_tokens * heads
    are_many = num_rows * queries >= SHARING_FROM and queries >= 2 * SHARING_QUERIES and not rows.causal
    fit = q.dtype == torch.bfloat16 and size in (64, 128, 256) and SHARING_QUERIES % heads == 0
    return are_many and fit and torch.cuda.get_device_capability(q.device)[0] == 9


def tile_of(num_rows: int, queries: int) -> AttendTile:
    """For so many rows with so many queries each."""
    if queries <= 16:  # Text.
        few = AttendTile(16, 32, 4, 2, 2 * MULTIPROCESSORS)
        return few if num_rows <= 8 else AttendTile(16, 64, 4, 3, MULTIPROCESSORS)
    fitting = [tile for most, tile in ATTEND_TILES.items() if num_rows * queries <= most]
    return fitting[0] if fitting else AttendTile(64, 64, 4, 2)


def cut_keys(most: int, tiles: int, n: int, programs: int) -> tuple[int, int]:
    """Keys of one piece, in whole blocks of n, and how many pieces, so that there are at most about so many programs.

    A row's own keys are in the last piece: as a piece more they made programs wait that had no multiprocessor left.
    """
    blocks = -(-most // n)
    piece = -(-blocks // max(1, min(blocks, programs // tiles)))
    return piece * n, -(-blocks // piece)
