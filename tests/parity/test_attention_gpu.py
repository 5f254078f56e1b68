"""Attention's kernels on a GPU against plain torch in float32. Without a CUDA device these tests are skipped and say so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from policies.configuration import TowerSize
from services.inference.fused.ops import ReferenceOps
from services.inference.fused.slots import Rows, Slots, SlotSizes
from tests.support import fused_lab as lab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: kernels of attention"),
]

CUDA = torch.device("cuda")
# Of bfloat16: probabilities are rounded before they are multiplied, and pieces before they are put together.
TOLERANCE = 4e-3
PREFIX, TEXT, HORIZON, LAYER = 968, 128, 50, 1


def make_slots(heads: int, size: int) -> Slots:
    """Row 0 lacks its first camera, row 1 its second, row 2 nothing, and all others the end of their prompt."""
    sizes = SlotSizes(num_slots=18, max_prefix=PREFIX, max_text=TEXT, horizon=HORIZON)
    tower = TowerSize(width=64, depth=2, mlp=64, heads=heads, head_dim=size)
    slots = Slots(sizes, tower, 32, device=CUDA, dtype=torch.bfloat16)
    generator = torch.Generator(CUDA).manual_seed(size)
    slots.keys.normal_(generator=generator)
    slots.values.normal_(generator=generator)
    slots.valid[0, :256] = 0
    slots.valid[1, 256:512] = 0
    slots.valid[3:, 931:PREFIX] = 0
    return slots


def make_rows(num_rows: int, num_tokens: int, *, sees_own: bool, causal: bool = False) -> Rows:
    """Of a prefix, or of Euler steps behind prefixes and texts of different lengths, or of drafts behind a prefix."""
    index = torch.arange(num_rows, dtype=torch.int32, device=CUDA)
    seen = PREFIX + (0 if causal else TEXT) - 61 * index if sees_own else torch.full_like(index, num_tokens)
    if sees_own and not causal:
        seen[1:2] = 0  # Its own keys are all that it sees.
    return Rows(
        slots=index,
        positions=torch.zeros(num_rows, num_tokens, dtype=torch.int32, device=CUDA),
        seen=seen,
        # A draft's keys come straight behind what it looks back at.
        own=seen.clone() if causal else torch.full_like(index, PREFIX + TEXT),
        sees_own=sees_own,
        causal=causal,
    )


def in_float32(slots: Slots) -> Slots:
    return cast(Slots, SimpleNamespace(keys=slots.keys.float(), values=slots.values.float(), valid=slots.valid))


def attended(q: torch.Tensor, rows: Rows, slots: Slots, *, pdl: bool = True) -> torch.Tensor:
    from services.inference.fused import kernels_attention  # Triton is only there where a GPU is.

    launch: dict[str, Any] = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    return kernels_attention.attend(q, rows, slots, LAYER, launch)


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "sees_own", "heads", "size", "shares"),
    [
        *[(num_rows, num_tokens, False, 8, 256, True) for num_rows in (1, 2, 4) for num_tokens in (PREFIX, 816, 257)],
        *[(num_rows, HORIZON, True, 8, 256, num_rows > 2) for num_rows in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)],
        (4, 7, True, 8, 256, False),
        (18, 9, True, 8, 256, False),
        (2, PREFIX, False, 4, 64, True),
        (8, HORIZON, True, 16, 128, True),
        (2, PREFIX, False, 4, 16, False),
        (4, HORIZON, True, 12, 128, False),
    ],
)
def test_attention_is_that_of_plain_torch_whoever_is_in_the_pass(
    num_rows: int, num_tokens: int, sees_own: bool, heads: int, size: int, shares: bool
) -> None:
    from services.inference.fused.kernels_attention import _shares

    slots, rows = make_slots(heads, size), make_rows(num_rows, num_tokens, sees_own=sees_own)
    generator = torch.Generator(CUDA).manual_seed(num_rows)
    qkv = torch.randn(num_rows, num_tokens, heads + 2, size, device=CUDA, generator=generator).bfloat16()
    q = qkv[:, :, :heads] if num_tokens > HORIZON else qkv[:, :, :heads].contiguous()
    expected = ReferenceOps(torch.float32).attend(q.float(), rows, in_float32(slots), LAYER)
    if torch.cuda.get_device_capability()[0] == 9:
        assert _shares(q, rows) is shares
    found = attended(q, rows, slots)
    assert torch.equal(attended(q, rows, slots, pdl=False), found)
    for row in range(num_rows):
        assert lab.relative(found[row], expected[row]) < TOLERANCE
    if num_rows > 1:
        q[:-1] *= 50.0
        slots.values[:, : num_rows - 1] *= -3.0
        others = replace(rows, seen=rows.seen.clone())
        slots.valid[: num_rows - 1, 100:200] = 0
        others.seen[:-1] = 165 if sees_own else num_tokens
        assert torch.equal(attended(q, others, slots)[-1], found[-1])


@pytest.mark.parametrize("num_tokens", [2, 21, 33])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_a_token_of_a_draft_sees_those_before_it_and_none_behind(num_rows: int, num_tokens: int) -> None:
    slots, rows = make_slots(8, 256), make_rows(num_rows, num_tokens, sees_own=True, causal=True)
    generator = torch.Generator(CUDA).manual_seed(num_tokens)
    q = torch.randn(num_rows, num_tokens, 8, 256, device=CUDA, generator=generator).bfloat16()
    expected = ReferenceOps(torch.float32).attend(q.float(), rows, in_float32(slots), LAYER)
    found = attended(q, rows, slots)
    assert torch.equal(attended(q, rows, slots, pdl=False), found)
    for row in range(num_rows):
        assert lab.relative(found[row], expected[row]) < TOLERANCE
