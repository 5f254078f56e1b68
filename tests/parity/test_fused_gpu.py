"""The fused path on a GPU, with its kernels and captured graphs, against the plain module in float32.

Sizes of heads are the full ones, widths and depths are small. Without a CUDA device these tests are skipped and say so; the
same path without kernels and graphs is in tests/unit/inference/test_fused.py.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies import text
from policies.pi052.config import Precision
from policies.pi052.model import Pi052Network
from services.inference.device_gate import DeviceGate
from services.inference.fused import FusedPi052, fp8
from services.inference.fused.ops import ReferenceOps
from services.inference.fused.slots import Residual
from services.inference.fused.trial import staged_chunk
from services.inference.fused.units import NO_LOCATIONS
from services.inference.picture_gate import PictureGate
from services.inference.units import EXPERT_SIZES
from tests.support import fused_lab as lab

from .fused_gpu import CUDA, HORIZON, SIZES, TOLERANCE, fused_of, mixed_requests, staggered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: kernels and graphs of the fused path"),
]

# Where the MLPs of a prefix are multiplied in FP8.
FP8_TOLERANCE = 5e-2


@pytest.mark.parametrize("trained_max_delay", [0, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 16])
def test_chunks_are_those_of_the_plain_module_in_every_batch(
    networks: tuple[Pi052Network, Pi052Network], most: int, trained_max_delay: int
) -> None:
    served, plain = networks
    fused, asked = fused_of(served, trained_max_delay=trained_max_delay), mixed_requests(min(16, most + 2))
    slots = [slot for at in range(0, len(asked), 4) for slot in lab.begin(fused, asked[at : at + 4])]
    staggered(fused, slots, most)
    for slot, one in zip(slots, asked, strict=True):
        expected = lab.plain_chunk(plain, one, trained_max_delay=trained_max_delay)
        assert lab.relative(fused.slots.actions[slot], expected) < TOLERANCE


def test_a_row_has_the_same_bits_whoever_is_in_its_pass(networks: tuple[Pi052Network, Pi052Network]) -> None:
    fused, asked = fused_of(networks[0]), mixed_requests(8)
    for rows in (2, 4, 5, 6, 16):
        fewest = 1 + max(size for size in EXPERT_SIZES if size < rows)
        found = []
        for neighbours in (asked[1:rows], asked[-1:]):  # A full pass, and one with scratch rows.
            slots = [slot for one in [asked[0], *neighbours] for slot in lab.begin(fused, [one])][:rows]
            padded = slots + [fused.slots.scratch] * (fewest - len(slots))
            for step in range(lab.NUM_STEPS):
                fused.expert_step([(slot, step) for slot in padded])
            found.append(fused.slots.actions[slots[0]].clone())
            for slot in slots:
                fused.slots.give_back(slot)
        assert torch.equal(*found)


@pytest.mark.parametrize("num_tokens", [3, 48, 49, 200])
def test_the_chunk_of_a_robot_that_is_alone_is_that_of_the_plain_module(
    networks: tuple[Pi052Network, Pi052Network], num_tokens: int
) -> None:
    """With the shortest and the longest prompt of each bucket."""
    served, plain = networks
    fused, one = fused_of(served), lab.request(SIZES, 3, num_tokens, horizon=HORIZON)
    [slot] = lab.begin(fused, [one])
    staggered(fused, [slot], 1)
    assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(plain, one)) < TOLERANCE


def test_greedy_ids_are_those_of_the_plain_module_in_float32(networks: tuple[Pi052Network, Pi052Network]) -> None:
    """Fused weights, slots, units and graphs; bfloat16 kernels round, and near ties then fall either way.

    Kernels in float32 are in test_fused_ids.py.
    """
    plain = networks[1]
    fused, asked = fused_of(plain, dtype=torch.float32, kernels=False), mixed_requests(4)
    rules = text.Decoding(max_new_tokens=12, end_token=-5)
    slots = lab.begin(fused, asked)
    assert lab.fused_ids(fused, slots, NO_LOCATIONS, 12) == [lab.plain_ids(plain, one, rules) for one in asked]


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_logits_along_a_text_are_those_of_the_plain_module(networks: tuple[Pi052Network, Pi052Network], rows: int) -> None:
    served, plain = networks
    fused, asked = fused_of(served), mixed_requests(rows)
    slots = [slot for at in range(0, rows, 4) for slot in lab.begin(fused, asked[at : at + 4])]
    text_rows = [lab.TextRow(slot=slot, flags=0) for slot in slots]
    states = [lab.plain_state(plain, one, hidden=True) for one in asked]
    allowed = ~fused.units.forbidden[0]
    with torch.inference_mode():
        expected = [plain.text_logits(state.hidden[:, -1])[0] for state in states if state.hidden is not None]
        logits, _ = fused.first_text(text_rows)
        for step in range(6):
            for row in range(rows):
                assert lab.relative(logits[row][allowed], expected[row][allowed]) < TOLERANCE
            for row, slot in enumerate(slots):  # The same tokens for both, whatever a near tie says.
                token = 1000 + 10 * row + step
                fused.set_token(slot, token)
                answer, states[row] = plain.text_step(states[row], torch.tensor([token], device=CUDA))
                expected[row] = answer[0]
            logits, _ = fused.text_step(text_rows)


@pytest.mark.parametrize("num_slices", [2, 5])
def test_a_prefix_in_slices_is_a_whole_one_whatever_runs_between(
    networks: tuple[Pi052Network, Pi052Network], num_slices: int
) -> None:
    """Graphs share their memory: what a slice leaves for the next must not lie there."""
    served, plain = networks
    fused, others = fused_of(served, prefix_slices=num_slices), mixed_requests(4)
    fused.prepare()
    allowed = ~fused.units.forbidden[NO_LOCATIONS]

    def between() -> None:
        for group in (others[:1], others[1:2], others):  # One row of either bucket, and several.
            slots = lab.begin(fused, group)
            fused.expert_step([(slot, 0) for slot in slots])
            fused.first_text([lab.TextRow(slot=slot, flags=0) for slot in slots])
            for slot in slots:
                fused.slots.give_back(slot)

    for num_tokens in (3, 48, 49, 200):
        one = lab.request(SIZES, num_tokens, num_tokens, horizon=HORIZON, lacks=1 if num_tokens == 49 else None)
        length = lab.NUM_CAMERAS * SIZES.num_patches + (48 if num_tokens <= 48 else 200)
        kept = []
        in_slices = (lab.begin_in_slices(fused, one, between, are_seen=are_seen) for are_seen in (False, True))
        for slot in (lab.begin(fused, [one])[0], *in_slices):
            pool = fused.slots
            counts = torch.stack([pool.action_keys, pool.text_keys, pool.action_position, pool.text_position])[:, slot]
            logits = fused.first_text([lab.TextRow(slot=slot, flags=NO_LOCATIONS)])[0][0, allowed]
            left = (logits, pool.keys[:, slot, :length], pool.values[:, slot, :length], pool.last_hidden[slot], counts)
            kept.append([tensor.clone() for tensor in left])
            state = lab.plain_state(plain, one, hidden=True)
            assert state.hidden is not None
            with torch.inference_mode():
                expected = plain.text_logits(state.hidden[:, -1])[0]
            assert lab.relative(logits, expected[allowed]) < TOLERANCE
            pool.give_back(slot)
        for in_pieces in kept[1:]:
            for sliced, whole in zip(in_pieces, kept[0], strict=True):
                assert lab.relative(sliced, whole) < TOLERANCE


def test_a_draft_gives_what_step_by_step_decoding_gives(networks: tuple[Pi052Network, Pi052Network]) -> None:
    fused, [one] = fused_of(networks[1], dtype=torch.float32, kernels=False, draft_length=20), mixed_requests(1)
    [slot] = lab.begin(fused, [one])
    [ids] = lab.fused_ids(fused, [slot], NO_LOCATIONS, 22)
    fused.slots.give_back(slot)
    [slot] = lab.begin(fused, [one])
    rows = [lab.TextRow(slot=slot, flags=NO_LOCATIONS)]
    fused.first_text(rows)
    tokens, counts = fused.check_draft(rows, [ids[1:21]])
    assert counts.tolist() == [21]
    assert tokens[0].tolist() == ids[1:]


def test_new_weights_serve_in_graphs_that_were_captured_before(networks: tuple[Pi052Network, Pi052Network]) -> None:
    served, _ = networks
    other = lab.network(SIZES, seed=5, device=CUDA)
    plain = lab.network(replace(SIZES, precision=Precision.FLOAT32), device=CUDA)
    plain.load_state_dict({name: value.float() for name, value in other.state_dict().items()})
    fused, [one] = fused_of(served), mixed_requests(1)
    seen = []
    fused.prepare(lambda done, total, _: seen.append((done, total)))
    assert seen[-1] == (len(seen), len(seen))
    fused.weights.stage(other.state_dict())
    tried = staged_chunk(fused.units, one.pictures.to(CUDA), one.tokens, lab.start(one), range(lab.NUM_STEPS), length=48)
    assert lab.relative(tried.to(CUDA), lab.plain_chunk(plain, one)) < TOLERANCE
    fused.weights.commit()
    [slot] = lab.begin(fused, [one])
    staggered(fused, [slot], 1)
    assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(plain, one)) < TOLERANCE


def test_attention_over_what_is_no_number_is_no_number(networks: tuple[Pi052Network, Pi052Network]) -> None:
    """Or a version whose scores overflow would pass its canary as one that looks at nothing."""
    fused = fused_of(networks[0])
    slots = torch.arange(4, dtype=torch.int32, device=CUDA)
    fused.slots.action_keys.fill_(200)
    with torch.inference_mode():
        rows = fused.units.few.expert_rows(fused.slots, slots, slots, trained=False)
        q = torch.randn(4, HORIZON, 8, 256, dtype=torch.bfloat16, device=CUDA)
        q[1] = torch.nan
        mixed = fused.units.few.attend(q, rows, fused.slots, 0)
    assert mixed[1].isnan().all()
    assert mixed[[0, 2, 3]].isfinite().all()


# -- FP8 ---------------------------------------------------------------------------------------------------------------


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that multiplies FP8"
)


def check_quantized(found: fp8.Quantized, expected: fp8.Quantized) -> None:
    """Numbers near the middle between two of FP8 may fall either way."""
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0.0)
    ours, theirs = found.values.float(), expected.values.float()
    assert lab.relative(ours, theirs) < 1e-2
    assert (ours != theirs).float().mean() < 1e-3


@needs_fp8
@pytest.mark.parametrize(("num_rows", "size"), [(1, 256), (7, 304), (968, 2048), (33, 16384)])
def test_kernels_quantise_as_plain_torch_does(num_rows: int, size: int) -> None:
    """Rows of very different size, the first of zeros."""
    from services.inference.fused import kernels_fp8

    generator = torch.Generator(CUDA).manual_seed(num_rows)
    sizes = torch.logspace(-3, 2, num_rows, device=CUDA)[:, None]
    x = torch.randn(num_rows, size, device=CUDA, generator=generator) * sizes
    gate_up = (torch.randn(num_rows, 2 * size, device=CUDA, generator=generator) * sizes).bfloat16()
    if num_rows > 1:
        x[0], gate_up[0] = 0.0, 0.0
    gate, up = gate_up.float().chunk(2, dim=-1)
    hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
    for pdl in (False, True):
        launch = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
        check_quantized(kernels_fp8.quantized(x, launch), fp8.quantized(x))
        check_quantized(kernels_fp8.gelu_mul_quantized(gate_up, launch), fp8.quantized(hidden))
    for broken in (torch.nan, torch.inf):
        x[-1, 5], gate_up[-1, 5] = broken, broken
        for quantised in (kernels_fp8.quantized(x, launch), kernels_fp8.gelu_mul_quantized(gate_up, launch)):
            weight = fp8.quantized(torch.ones(16, size, device=CUDA))
            finite = kernels_fp8.product(quantised, weight).isfinite()
            assert finite[:-1].all()
            assert not finite[-1].any()


@needs_fp8
@pytest.mark.parametrize("num_tokens", [1, 101, 976])
def test_an_mlp_in_fp8_is_its_emulation(networks: tuple[Pi052Network, Pi052Network], num_tokens: int) -> None:
    fused = fused_of(networks[0], fp8=True)
    weights = fused.weights.language[0].fp8
    assert weights is not None
    generator = torch.Generator(CUDA).manual_seed(num_tokens)
    normed = torch.randn(2, num_tokens, SIZES.language.width, device=CUDA, generator=generator).bfloat16()
    normed[0] *= 30.0
    ours, theirs = (Residual(x=torch.zeros_like(normed)) for _ in range(2))
    fused.units.many.mlp_fp8(ours, normed, weights)
    ReferenceOps(torch.bfloat16).mlp_fp8(theirs, normed, weights)
    for row in range(2):  # Sums differ by what matrix units round; a number in a thousand then falls to another one of FP8.
        assert lab.relative(ours.x[row], theirs.x[row]) < 2 * TOLERANCE


@needs_fp8
def test_prefixes_in_fp8_are_near_the_plain_module_and_so_are_their_chunks(
    networks: tuple[Pi052Network, Pi052Network],
) -> None:
    served, plain = networks
    fused, asked = fused_of(served, fp8=True, prefix_slices=5), mixed_requests(8)
    fused.prepare()
    allowed = ~fused.units.forbidden[0]
    slots = [slot for at in (0, 4) for slot in lab.begin(fused, asked[at : at + 4])]
    slots += [lab.begin_in_slices(fused, one) for one in asked[:4]]
    for slot, one in zip(slots, asked + asked[:4], strict=True):
        state = lab.plain_state(plain, one, hidden=True)
        assert state.hidden is not None
        with torch.inference_mode():
            expected = plain.text_logits(state.hidden[:, -1])[0, allowed]
        logits = fused.first_text([lab.TextRow(slot=slot, flags=0)])[0][0, allowed]
        assert lab.relative(logits, expected) < FP8_TOLERANCE
    staggered(fused, slots[:8], 4)
    for slot, one in zip(slots[:8], asked, strict=True):
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(plain, one)) < FP8_TOLERANCE


@needs_fp8
def test_a_prefix_in_fp8_has_the_same_bits_whoever_is_in_its_pass(networks: tuple[Pi052Network, Pi052Network]) -> None:
    fused, asked = fused_of(networks[0], fp8=True), mixed_requests(8)
    one, length = asked[1], lab.NUM_CAMERAS * SIZES.num_patches + 200
    found = []
    for others in (asked[2:5], asked[5:8], [replace(asked[3], pictures=asked[3].pictures * 100), *asked[6:8]]):
        slots = lab.begin(fused, [one, *others])
        logits = fused.first_text([lab.TextRow(slot=slots[0], flags=0)])[0][0]
        pool = fused.slots
        found.append(
            [tensor.clone() for tensor in (pool.keys[:, slots[0], :length], pool.values[:, slots[0], :length], logits)]
        )
        for slot in slots:
            pool.give_back(slot)
    for again in found[1:]:
        for ours, theirs in zip(again, found[0], strict=True):
            assert torch.equal(ours, theirs)


@needs_fp8
def test_new_weights_in_fp8_serve_in_graphs_that_were_captured_before(networks: tuple[Pi052Network, Pi052Network]) -> None:
    other = lab.network(SIZES, seed=5, device=CUDA)
    [one] = mixed_requests(1)

    def logits(fused: FusedPi052) -> torch.Tensor:
        [slot] = lab.begin(fused, [one])
        found = fused.first_text([lab.TextRow(slot=slot, flags=0)])[0][0, ~fused.units.forbidden[0]]
        fused.slots.give_back(slot)
        return found

    fused = fused_of(networks[0], fp8=True)
    before = logits(fused)
    fused.weights.stage(other.state_dict())
    assert torch.equal(logits(fused), before)
    fused.weights.commit()
    assert lab.relative(logits(fused), logits(fused_of(other, fp8=True))) < FP8_TOLERANCE
    assert lab.relative(logits(fused), before) > 0.5
    fused.weights.stage(networks[0].state_dict())
    fused.weights.commit()
    assert torch.equal(logits(fused), before)


def test_the_device_waits_for_pictures_that_come_through_the_gate(networks: tuple[Pi052Network, Pi052Network]) -> None:
    fused = fused_of(networks[0], pictures_fit=True)
    shape = (lab.NUM_CAMERAS, SIZES.image_height, SIZES.image_width, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = fused.vision_of_bytes(pictures).clone()
    size = 1 << 20
    gate = PictureGate(mmap.mmap(-1, size + mmap.PAGESIZE), mmap.PAGESIZE, size)
    ahead = fused.vision_ahead(DeviceGate(gate, CUDA))
    for number in (1, 2, 3):
        ahead.launch(number)
        done = torch.cuda.Event(enable_timing=True)
        done.record()
        time.sleep(0.1)
        assert not done.query()
        gate.pictures[: pictures.size] = 0 if number == 1 else pictures.reshape(-1)
        gate.open(number)
        done.synchronize()
        if number == 3:
            fused.expert_step([(fused.slots.scratch, 0)])
            assert ahead.take(number) is None, "another unit wrote over it"
            break
        seen = ahead.take(number)
        assert seen is not None
        assert torch.equal(seen.tokens, expected) is (number == 2)
        assert seen.began.elapsed_time(done) < 50.0, "of its 100 ms at the gate none counts"
