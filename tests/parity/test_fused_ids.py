"""Greedy ids of the fused path are those of the plain module, in float32: in every bucket of text, by steps and by drafts.

On a GPU with its kernels and graphs; without a CUDA device that is skipped and says so. On the CPU with neither. What serves
is in bfloat16, whose near ties fall either way: how near its logits are test_fused_gpu.py and test_fused_buckets_gpu.py say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from policies import text
from policies.pi052.model import Pi052Network
from services.inference.fused import FusedPi052
from services.inference.fused.units import NO_LOCATIONS
from services.inference.units import PREFIX_SIZES, doubling_sizes
from tests.support import fused_lab as lab

from .fused_gpu import fused_of, mixed_requests

TEXT_SIZES = doubling_sizes(32)
NUM_TOKENS, DRAFT_LENGTH = 8, 20


@dataclass(frozen=True, kw_only=True)
class Both:
    """Attributes:
    asked: Requests, one a row of the largest bucket.
    expected: Their ids by the plain module, (rows, NUM_TOKENS).
    """

    fused: FusedPi052
    asked: Sequence[lab.Request]
    expected: Sequence[Sequence[int]]


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="needs a CUDA device: kernels and graphs of the fused path"
                ),
            ],
        ),
    ],
)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    on_gpu = request.param == "cuda"
    plain: Pi052Network = request.getfixturevalue("networks")[1] if on_gpu else lab.network()
    fused = fused_of(
        plain, dtype=torch.float32, kernels=on_gpu, text_rows=TEXT_SIZES, num_slots=32, draft_length=DRAFT_LENGTH
    )
    asked = mixed_requests(max(TEXT_SIZES), sizes=plain.config)
    rules = text.Decoding(max_new_tokens=NUM_TOKENS, end_token=-5)
    with pytest.MonkeyPatch.context() as patch:
        # On for convolutions unless said otherwise: the plain module's patches would be off.
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        if on_gpu:
            make_room_for_float32(patch, fused)
        yield Both(fused=fused, asked=asked, expected=[lab.plain_ids(plain, one, rules) for one in asked])


def make_room_for_float32(patch: pytest.MonkeyPatch, fused: FusedPi052) -> None:
    """Tiles are chosen for bfloat16: of numbers twice as wide an H200's shared memory does not hold all of them.

    Text's products stay as they serve, and so does its attention up to 8 rows; beyond, it has the same tiles and reads no
    block of keys ahead. Prefixes and drafts read fewer keys, or weights, at a time.
    """
    from services.inference.fused import kernels_attention  # Triton is only there where a GPU is.

    chosen = kernels_attention.tile_of

    def tile_of(num_rows: int, queries: int) -> kernels_attention.AttendTile:
        tile = chosen(num_rows, queries)
        if tile.n <= 32:
            return tile
        return replace(tile, stages=1) if tile.m == 16 else replace(tile, n=32, stages=2)

    patch.setattr(kernels_attention, "tile_of", tile_of)
    tiles = fused.units.few.tiles  # type: ignore[attr-defined]
    for (what, most), tile in tiles.items():
        if most > 64:
            tiles[what, most] = replace(tile, stages=min(tile.stages, 3))


def begin(fused: FusedPi052, asked: Sequence[lab.Request]) -> list[int]:
    """One prefix in three comes in slices, as questions do, every second of these of pictures that were seen before; the
    others come whole, up to four together. Slots in the order asked."""
    whole = [row for row in range(len(asked)) if row % 3 != 1]
    slots: dict[int, int] = {}
    for at in range(0, len(whole), 4):
        group = whole[at : at + 4]
        slots |= dict(zip(group, lab.begin(fused, [asked[row] for row in group]), strict=True))
    for row in range(1, len(asked), 3):
        slots[row] = lab.begin_in_slices(fused, asked[row], are_seen=row % 2 == 0)
    return [slots[row] for row in range(len(asked))]


@pytest.mark.parametrize("bucket", TEXT_SIZES)
def test_rows_that_decode_together_have_the_ids_of_the_plain_module(both: Both, bucket: int) -> None:
    """In a full bucket, and as the fewest rows that take it, with scratch rows beside them."""
    for num_rows in {bucket, bucket // 2 + 1}:
        slots = begin(both.fused, both.asked[:num_rows])
        found = lab.fused_ids(both.fused, slots, NO_LOCATIONS, NUM_TOKENS)
        for slot in slots:
            both.fused.slots.give_back(slot)
        assert found == both.expected[:num_rows]


@pytest.mark.parametrize("bucket", sorted(PREFIX_SIZES))
def test_drafts_give_the_ids_of_the_plain_module_and_steps_go_on_behind_them(both: Both, bucket: int) -> None:
    """One draft is right to its end, one from its first token on wrong."""
    fused, expected = both.fused, both.expected[:bucket]
    slots = begin(fused, both.asked[:bucket])
    rows = [lab.TextRow(slot=slot, flags=NO_LOCATIONS) for slot in slots]
    length = NUM_TOKENS - 2
    num_right = (length, 2, 0, 4)[:bucket]
    found = [[token] for token in fused.first_text(rows)[1].tolist()]
    drafts = [[*ids[1 : 1 + right], *[7] * (length - right)] for ids, right in zip(expected, num_right, strict=True)]
    places = (fused.slots.text_keys, fused.slots.text_position)
    before = [place[slots] for place in places]
    tokens, counts = (answer.tolist() for answer in fused.check_draft(rows, drafts))
    moved = [(place[slots] - was).tolist() for place, was in zip(places, before, strict=True)]
    for row, count in enumerate(counts):
        found[row] += tokens[row][:count]
    for _ in range(length):
        for row, token in enumerate(fused.text_step(rows)[1].tolist()):
            found[row].append(token)
    for slot in slots:
        fused.slots.give_back(slot)
    assert counts == [right + 1 for right in num_right]
    assert moved == [counts, counts]
    assert [ids[:NUM_TOKENS] for ids in found] == expected
