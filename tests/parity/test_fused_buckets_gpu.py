"""Every bucket of the fused path on a GPU, filled and at different steps, against the plain module in float32.

Without a CUDA device these tests are skipped and say so.
"""

from __future__ import annotations

import pytest
import torch

from policies.pi052.model import Pi052Network
from services.inference.fused import FusedPi052, PrefixRow
from services.inference.units import EXPERT_SIZES, PREFIX_SIZES, doubling_sizes
from tests.support import fused_lab as lab

from .fused_gpu import CUDA, SIZES, TOLERANCE, fused_of, mixed_requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: kernels and graphs of the fused path"),
]

PROMPT_LENGTHS = (48, 96, 200)
TEXT_SIZES = doubling_sizes(32)


def begin(fused: FusedPi052, asked: list[lab.Request]) -> list[int]:
    """Vision of all, prefixes of all, starts of all: a unit each."""
    slots = [slot for slot in (fused.slots.take() for _ in asked) if slot is not None]
    pictures = torch.cat([one.pictures for one in asked]).to(fused.device)
    tokens = fused.vision(pictures).view(len(asked), -1, SIZES.language.width).clone()
    fused.prefix([
        PrefixRow(slot=slot, picture_tokens=seen, picture_valid=one.picture_valid, tokens=one.tokens)
        for slot, seen, one in zip(slots, tokens, asked, strict=True)
    ])  # fmt: skip
    fused.begin_chunks([(slot, lab.start(one)) for slot, one in zip(slots, asked, strict=True)])
    return slots


@pytest.mark.parametrize("rows", EXPERT_SIZES)
def test_euler_steps_of_a_full_bucket(networks: tuple[Pi052Network, Pi052Network], rows: int) -> None:
    """One row in three is a step ahead, one two."""
    served, plain = networks
    fused, asked = fused_of(served), mixed_requests(rows)
    slots = [slot for at in range(0, rows, 4) for slot in lab.begin(fused, asked[at : at + 4])]
    ahead = [row % 3 for row in range(rows)]
    for row, steps in enumerate(ahead):
        for step in range(steps):
            fused.expert_step([(slots[row], step)])
    for step in range(lab.NUM_STEPS):
        waiting = [(slot, step + steps) for slot, steps in zip(slots, ahead, strict=True) if step + steps < lab.NUM_STEPS]
        assert len(waiting) == rows or step > lab.NUM_STEPS - 3
        fused.expert_step(waiting)
    for slot, one in zip(slots, asked, strict=True):
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(plain, one)) < TOLERANCE


@pytest.mark.parametrize("longest", PROMPT_LENGTHS)
@pytest.mark.parametrize("rows", sorted(PREFIX_SIZES))
def test_vision_and_prefixes_of_a_full_bucket(networks: tuple[Pi052Network, Pi052Network], rows: int, longest: int) -> None:
    """A chunk hardly looks at its prefix in a network that was never trained; the first token of a text does."""
    served, plain = networks
    fused = fused_of(served, prompt_lengths=PROMPT_LENGTHS)
    asked = mixed_requests(rows + 1, longest)[1:]  # The second has the longest prompt.
    allowed = ~fused.units.forbidden[0]
    slots = begin(fused, asked)
    logits = fused.first_text([lab.TextRow(slot=slot, flags=0) for slot in slots])[0].clone()
    for step in range(lab.NUM_STEPS):
        fused.expert_step([(slot, step) for slot in slots])
    for row, (slot, one) in enumerate(zip(slots, asked, strict=True)):
        state = lab.plain_state(plain, one, hidden=True)
        assert state.hidden is not None
        with torch.inference_mode():
            expected = plain.text_logits(state.hidden[:, -1])[0]
        assert lab.relative(logits[row][allowed], expected[allowed]) < TOLERANCE
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(plain, one)) < TOLERANCE


@pytest.mark.parametrize("rows", TEXT_SIZES)
def test_text_steps_of_a_full_bucket(networks: tuple[Pi052Network, Pi052Network], rows: int) -> None:
    served, plain = networks
    fused, asked = fused_of(served, text_rows=TEXT_SIZES, num_slots=32), mixed_requests(rows)
    slots = [slot for at in range(0, rows, 4) for slot in lab.begin(fused, asked[at : at + 4])]
    text_rows = [lab.TextRow(slot=slot, flags=0) for slot in slots]
    fused.first_text(text_rows)
    tokens = [1000 + 10 * row for row in range(rows)]  # The same for both, whatever a near tie says.
    for slot, token in zip(slots, tokens, strict=True):
        fused.set_token(slot, token)
    logits, _ = fused.text_step(text_rows)
    allowed = ~fused.units.forbidden[0]
    with torch.inference_mode():
        for row, (one, token) in enumerate(zip(asked, tokens, strict=True)):
            state = lab.plain_state(plain, one, hidden=True)
            expected, _ = plain.text_step(state, torch.tensor([token], device=CUDA))
            assert lab.relative(logits[row][allowed], expected[0][allowed]) < TOLERANCE


@pytest.mark.parametrize("rows", sorted(PREFIX_SIZES))
def test_a_draft_leaves_the_keys_of_steps(networks: tuple[Pi052Network, Pi052Network], rows: int) -> None:
    """Whatever it agrees with: near ties fall either way in bfloat16."""
    fused, asked = fused_of(networks[0], draft_length=20), mixed_requests(rows)
    pool, num_prefix = fused.slots, lab.NUM_CAMERAS * SIZES.num_patches + 200
    drafts = [[2000 + 30 * row + at for at in range(20)] for row in range(rows)]
    left = []
    for by_steps in (True, False):
        slots = begin(fused, asked)
        text_rows = [lab.TextRow(slot=slot, flags=0) for slot in slots]
        fused.first_text(text_rows)
        for slot in slots:
            fused.set_token(slot, 1999)
        begins = [int(pool.text_keys[slot]) for slot in slots]
        if by_steps:
            for at in range(21):
                fused.text_step(text_rows)
                for row, slot in enumerate(slots):
                    fused.set_token(slot, drafts[row][at] if at < 20 else 0)
        else:
            tokens, counts = fused.check_draft(text_rows, drafts)
            assert tokens.shape == (rows, 21)
            assert (counts >= 1).all()
        left.append([
            (pool.keys[:, slot, begin : begin + 21].clone(), pool.values[:, slot, begin : begin + 21].clone())
            for slot, begin in zip(slots, begins, strict=True)
        ])  # fmt: skip
        assert max(begins) <= num_prefix
        for slot in slots:
            pool.give_back(slot)
    for ours, theirs in zip(left[1], left[0], strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            assert lab.relative(found, expected) < TOLERANCE
