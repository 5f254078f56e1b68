"""Attention as the towers of the large policies share it: rotary positions, grouped heads, blocks of tokens.

Shapes: B rows, S tokens, L keys looked at, N query heads, V key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

ROPE_BASE = 10000.0
# Not -inf: a row that may see nothing (padding) becomes uniform rather than NaN. bfloat16 holds it.
MASKED_BIAS = -2.3819763e38

# Of one layer: keys after rotation and values, both (B, V, L, H).
KeysValues = tuple[torch.Tensor, torch.Tensor]


def rotation(positions_BS: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embedding, each (B, 1, S, H) float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angle = positions_BS[:, None, :, None].float() * (1.0 / ROPE_BASE**exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, H), first half against second half."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q_BNSH: torch.Tensor, k_BVLH: torch.Tensor, v_BVLH: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(B, S, N*H). Query heads share key heads in equal groups."""
    group = q_BNSH.shape[1] // k_BVLH.shape[1]
    # A view with stride 0 where there is one key head, as in Gemma 2B.
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k_BVLH, v_BVLH))
    mixed_BNSH = functional.scaled_dot_product_attention(q_BNSH, k, v, attn_mask=bias)
    return mixed_BNSH.transpose(1, 2).flatten(2)


def prefix_attention(valid_BS: torch.Tensor, marks_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, S) bool, query by key. marks: bool, where a block begins."""
    block_BS = marks_BS.cumsum(dim=1)
    ordered_BSS = block_BS[:, None, :] <= block_BS[:, :, None]
    return ordered_BSS & valid_BS[:, None, :] & valid_BS[:, :, None]


def prefix_positions(valid_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: padding takes no position."""
    return valid_BS.cumsum(dim=1) - 1


def bias(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, queries, keys) bool to what is added to scores, (B, 1, queries, keys)."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, MASKED_BIAS)[:, None]


def appended(past: Sequence[KeysValues], made: Sequence[KeysValues]) -> list[KeysValues]:
    """Per layer, the keys and values of tokens that come after those of past."""
    return [
        (torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2))
        for (past_k, past_v), (k, v) in zip(past, made, strict=True)
    ]
