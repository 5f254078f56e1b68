"""The fused path without kernels and graphs, on the CPU in float32, against the plain module."""

from __future__ import annotations

import pytest
import torch

from manyhands.errors import InvalidInput
from policies import images, text
from policies.pi052.config import NetworkConfig
from services.inference.fused import FusedPi052, prefix_slices
from services.inference.fused.slots import SlotSizes
from services.inference.fused.trial import staged_chunk
from services.inference.fused.units import NO_LOCATIONS
from tests.support import fused_lab as lab

TOLERANCE = 1e-5
CPU = torch.device("cpu")


def fused_of(model: torch.nn.Module, **changes: object) -> FusedPi052:
    made = FusedPi052(lab.TINY, lab.settings(**changes), CPU, dtype=torch.float32)
    made.weights.refill(model.state_dict())
    return made


def mixed_requests() -> list[lab.Request]:
    """Different prompt lengths, cameras, and committed prefixes of different lengths, delays and horizons."""
    return [
        lab.request(lab.TINY, 1, 5),
        lab.request(lab.TINY, 2, 20, committed=7, delay_steps=2, execution_horizon=6),
        lab.request(lab.TINY, 3, 11, lacks=1, committed=10, delay_steps=4, execution_horizon=9),
        lab.request(lab.TINY, 4, 24, committed=3, delay_steps=5, execution_horizon=10),
    ]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return lab.network()


def run_staggered(fused: FusedPi052, slots: list[int], num_steps: int) -> None:
    """Row n starts n steps after row 0, so that rows of every step share passes."""
    steps = dict.fromkeys(slots, 0)
    tick = 0
    while any(step < num_steps for step in steps.values()):
        rows = [(slot, steps[slot]) for n, slot in enumerate(slots) if n <= tick and steps[slot] < num_steps]
        fused.expert_step(rows)
        for slot, _ in rows:
            steps[slot] += 1
        tick += 1


def test_rows_at_different_steps_give_the_chunks_of_the_plain_module(model: torch.nn.Module) -> None:
    fused, asked = fused_of(model), mixed_requests()
    slots = lab.begin(fused, asked)
    run_staggered(fused, slots, lab.NUM_STEPS)
    for slot, one in zip(slots, asked, strict=True):
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(model, one)) < TOLERANCE


def test_a_row_does_not_depend_on_its_neighbours(model: torch.nn.Module) -> None:
    asked = mixed_requests()
    alone = []
    for one in asked:
        fused = fused_of(model)
        [slot] = lab.begin(fused, [one])
        run_staggered(fused, [slot], lab.NUM_STEPS)
        alone.append(fused.slots.actions[slot].clone())
    fused = fused_of(model)
    slots = lab.begin(fused, asked[::-1], together=False)[::-1]
    run_staggered(fused, slots, lab.NUM_STEPS)
    for slot, chunk in zip(slots, alone, strict=True):
        assert lab.relative(fused.slots.actions[slot], chunk) < TOLERANCE


def test_a_slot_is_as_new_when_it_is_taken_again(model: torch.nn.Module) -> None:
    fused, asked = fused_of(model), mixed_requests()
    for left_behind in (fused.slots.keys, fused.slots.values, fused.slots.actions, fused.slots.committed, fused.slots.pull):
        left_behind.fill_(torch.nan)  # The reference masks it; kernels count on its being wiped.
    for one in (asked[1], asked[3], asked[2], asked[0]):  # Long prompts before short ones, text in between.
        [slot] = lab.begin(fused, [one])
        lab.fused_ids(fused, [slot], 0, 5)
        run_staggered(fused, [slot], lab.NUM_STEPS)
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(model, one)) < TOLERANCE
        fused.slots.give_back(slot)


def test_trained_chunking_keeps_committed_actions_bit_for_bit(model: torch.nn.Module) -> None:
    fused, asked = fused_of(model, trained_max_delay=4), mixed_requests()
    slots = lab.begin(fused, asked)
    run_staggered(fused, slots, lab.NUM_STEPS)
    for slot, one in zip(slots, asked, strict=True):
        chunk = fused.slots.actions[slot]
        assert lab.relative(chunk, lab.plain_chunk(model, one, trained_max_delay=4)) < TOLERANCE
        if one.committed is not None:
            kept = min(one.delay_steps, len(one.committed), 4)
            assert torch.equal(chunk[:kept], one.committed[:kept])


@pytest.mark.parametrize("suppress_locations", [True, False])
def test_rows_that_decode_together_give_the_greedy_ids_of_the_plain_module(
    model: torch.nn.Module, suppress_locations: bool
) -> None:
    fused, asked = fused_of(model), mixed_requests()
    rules = text.Decoding(max_new_tokens=9, end_token=-5, suppress_locations=suppress_locations)
    expected = [lab.plain_ids(model, one, rules) for one in asked]
    slots = lab.begin(fused, asked)
    assert lab.fused_ids(fused, slots, NO_LOCATIONS if suppress_locations else 0, 9) == expected


def test_tokens_that_may_not_come_are_those_of_the_policys_rules(model: torch.nn.Module) -> None:
    fused = fused_of(model)
    for flags in range(4):
        rules = text.Decoding(min_new_tokens=flags & 1, suppress_locations=bool(flags & NO_LOCATIONS))
        expected = text.allowed_logits(torch.zeros(1, lab.TINY.vocabulary), rules, 0)[0].isinf()
        assert torch.equal(fused.units.forbidden[flags], expected)
    one = mixed_requests()[0]
    [slot] = lab.begin(fused, [one])
    logits, _ = fused.first_text([lab.TextRow(slot=slot, flags=NO_LOCATIONS)])
    plain = model.text_logits(lab.plain_state(model, one, hidden=True).hidden[:, -1])
    expected = text.allowed_logits(plain, text.Decoding(), 0)[0]
    finite = expected.isfinite()
    assert torch.equal(logits[0].isfinite(), finite)
    assert lab.relative(logits[0][finite], expected[finite]) < TOLERANCE


@pytest.mark.parametrize("num_right", [0, 2, 5])
def test_a_draft_is_followed_as_far_as_greedy_decoding_agrees(model: torch.nn.Module, num_right: int) -> None:
    fused, asked = fused_of(model), mixed_requests()[:2]
    rules = text.Decoding(max_new_tokens=9, end_token=-5)
    expected = [lab.plain_ids(model, one, rules) for one in asked]
    slots = lab.begin(fused, asked)
    rows = [lab.TextRow(slot=slot, flags=NO_LOCATIONS) for slot in slots]
    fused.first_text(rows)
    drafts = [[*ids[1 : 1 + num_right], *[7] * (5 - num_right)] for ids in expected]
    before = fused.slots.text_position[slots]
    tokens, counts = fused.check_draft(rows, drafts)
    assert (fused.slots.text_position[slots] - before).tolist() == counts.tolist()
    assert counts.tolist() == [num_right + 1] * 2
    found = [[ids[0], *tokens[row, : num_right + 1].tolist()] for row, ids in enumerate(expected)]
    for _ in range(9 - len(found[0])):
        for row, token in enumerate(fused.text_step(rows)[1].tolist()):
            found[row].append(token)
    assert found == expected


def left_by_a_prefix(fused: FusedPi052, slot: int, length: int) -> list[torch.Tensor]:
    """All that a slot knows behind its prefix of so many tokens, and the logits of its first text token."""
    pool = fused.slots
    logits, _ = fused.first_text([lab.TextRow(slot=slot, flags=NO_LOCATIONS)])
    whole = (pool.valid, pool.action_keys, pool.text_keys, pool.action_position, pool.text_position, pool.last_hidden)
    kept = [*(tensor[slot] for tensor in whole), pool.keys[:, slot, :length], pool.values[:, slot, :length], logits]
    return [tensor.clone() for tensor in kept]


@pytest.mark.parametrize("are_seen", [False, True])
@pytest.mark.parametrize("num_slices", [None, 5])
def test_a_prefix_in_slices_leaves_the_bits_of_a_whole_one(
    model: torch.nn.Module, num_slices: int | None, are_seen: bool
) -> None:
    """Cut between all layers or behind vision; both prompt buckets, a missing camera, pictures that were seen before, and
    units of other rows between two slices."""
    fused, asked = fused_of(model, prefix_slices=num_slices), mixed_requests()
    assert fused.num_prefix_slices == (num_slices or 3)
    assert fused.num_vision_slices == (2 if num_slices else 1)
    acting, decoding = lab.begin(fused, [asked[1], asked[3]])
    decoding_row = lab.TextRow(slot=decoding, flags=0)
    fused.first_text([decoding_row])
    turns = []

    def others() -> None:
        turns.append(len(turns))
        for row in (asked[2], asked[0]):  # The same buckets as the question's, and another robot's pictures.
            [other] = lab.begin(fused, [row])
            fused.expert_step([(other, 0), (acting, 1)])
            fused.slots.give_back(other)
        if turns == [0]:
            fused.text_step([decoding_row])
            fused.check_draft([decoding_row], [[5, 6]])

    for one in asked:
        length = lab.NUM_CAMERAS * lab.TINY.num_patches + (8 if len(one.tokens) <= 8 else 24)
        [slot] = lab.begin(fused, [one])
        expected = left_by_a_prefix(fused, slot, length)
        fused.slots.wipe(slot)
        fused.slots.give_back(slot)
        turns.clear()
        slot = lab.begin_in_slices(fused, one, others, are_seen=are_seen)
        assert len(turns) == fused.num_prefix_slices - (fused.num_vision_slices if are_seen else 1)
        for left, whole in zip(left_by_a_prefix(fused, slot, length), expected, strict=True):
            assert torch.equal(left, whole)
        fused.slots.give_back(slot)


def test_a_question_may_be_given_up_amid_its_prefix(model: torch.nn.Module) -> None:
    fused, asked = fused_of(model, prefix_slices=5), mixed_requests()
    expected = lab.plain_ids(model, asked[2], text.Decoding(max_new_tokens=4, end_token=-5))
    for num_run in range(1, 5):
        given_up = fused.slots.take()
        assert given_up is not None
        fused.begin_question(given_up, asked[1].pictures, asked[1].picture_valid, asked[1].tokens)
        for at in range(num_run):
            fused.prefix_slice(given_up, at)
        fused.give_up_question(given_up)
        fused.slots.give_back(given_up)
        slot = lab.begin_in_slices(fused, asked[2])
        assert slot == given_up
        assert lab.fused_ids(fused, [slot], NO_LOCATIONS, 4) == [expected]
        fused.slots.give_back(slot)
        with pytest.raises(AssertionError, match="no prefix in progress"):
            fused.prefix_slice(slot, num_run)


def test_questions_amid_their_prefixes_do_not_meet(model: torch.nn.Module) -> None:
    """Their slices in turns, of different prompt lengths and pictures; and a slice out of its order is a mistake."""
    fused, asked = fused_of(model, prefix_slices=4, questions_at_once=2), mixed_requests()[:2]
    rules = text.Decoding(max_new_tokens=4, end_token=-5)
    slots = [fused.slots.take(), fused.slots.take()]
    for slot, one in zip(slots, asked, strict=True):
        assert slot is not None
        fused.begin_question(slot, one.pictures, one.picture_valid, one.tokens)
    for at in range(fused.num_prefix_slices):
        for slot in slots:
            assert slot is not None
            if at == 1:
                with pytest.raises(AssertionError, match="comes next"):
                    fused.prefix_slice(slot, 2)
            fused.prefix_slice(slot, at)
    for slot, one in zip(slots, asked, strict=True):
        assert slot is not None
        assert lab.fused_ids(fused, [slot], NO_LOCATIONS, 4) == [lab.plain_ids(model, one, rules)]


def test_one_slice_cannot_be() -> None:
    with pytest.raises(ValueError, match="two slices at least"):
        FusedPi052(lab.TINY, lab.settings(prefix_slices=1), CPU, dtype=torch.float32)


def test_slices_of_a_full_size_network_are_no_longer_than_a_text_step_and_end_where_vision_does() -> None:
    config = NetworkConfig()
    for num_cameras in (1, 2, 3, 4):
        num_patches = num_cameras * config.num_patches
        costs = prefix_slices.piece_costs_s(config, num_patches, num_patches + 200)
        slices = prefix_slices.planned(config, num_cameras=num_cameras, longest_prompt=200, num_slices=None)
        assert [piece for pieces in slices for piece in pieces] == list(range(27 + 17 + 1))
        lengths = [sum(costs[piece] for piece in pieces) for pieces in slices]
        assert max(lengths) <= prefix_slices.text_step_s(config)
        of_vision = sum(pieces.stop <= 27 for pieces in slices)
        assert sum(len(pieces) for pieces in slices[:of_vision]) == 27, "a slice ends where vision does"
        for some in (lengths[:of_vision], lengths[of_vision:]):
            assert max(some) < 1.5 * min(some)
        assert num_cameras != 3 or len(slices) == 6


def test_new_weights_serve_after_commit_and_not_before(model: torch.nn.Module) -> None:
    fused, one, other = fused_of(model), mixed_requests()[1], lab.network(seed=9)
    where = {name: view.data_ptr() for name, view in fused.weights.views.items()}
    fused.weights.stage(other.state_dict())
    for serving in (model, other):
        [slot] = lab.begin(fused, [one])
        run_staggered(fused, [slot], lab.NUM_STEPS)
        assert lab.relative(fused.slots.actions[slot], lab.plain_chunk(serving, one)) < TOLERANCE
        fused.slots.give_back(slot)
        fused.weights.commit()
    assert where == {name: view.data_ptr() for name, view in fused.weights.views.items()}


@pytest.mark.parametrize(
    "one", [one for one in mixed_requests() if all(one.picture_valid)], ids=lambda one: str(len(one.tokens))
)
def test_a_trial_is_a_chunk_of_the_staged_weights_and_touches_no_robot(model: torch.nn.Module, one: lab.Request) -> None:
    fused, other = fused_of(model), lab.network(seed=9)
    slots = lab.begin(fused, mixed_requests())
    fused.expert_step([(slot, 0) for slot in slots])
    pool = fused.slots
    states = (pool.keys, pool.values, *(tensor[None] for tensor in (pool.actions, pool.valid, pool.action_keys, pool.token)))
    before = [state[:, : pool.trial].clone() for state in states]
    fused.weights.stage(other.state_dict())
    made = staged_chunk(fused.units, one.pictures, one.tokens, lab.start(one), range(lab.NUM_STEPS), length=24)
    assert lab.relative(made, lab.plain_chunk(other, one)) < TOLERANCE
    assert lab.relative(made, lab.plain_chunk(model, one)) > TOLERANCE
    assert all(torch.equal(state[:, : pool.trial], kept) for state, kept in zip(states, before, strict=True))
    run = [(slot, step) for step in range(1, lab.NUM_STEPS) for slot in slots]
    for slot, step in run:
        fused.expert_step([(slot, step)])
    for slot, asked in zip(slots, mixed_requests(), strict=True):
        assert lab.relative(pool.actions[slot], lab.plain_chunk(model, asked)) < TOLERANCE


@pytest.mark.parametrize("horizon", [1, 50, 64, 65, 128, 200])
def test_no_block_of_keys_that_a_kernel_reads_ends_in_the_next_slot(horizon: int) -> None:
    sizes = SlotSizes(num_slots=1, max_prefix=968, max_text=128, horizon=horizon)
    for block in (32, 64, 128):
        assert sizes.text_capacity + -(-horizon // block) * block <= sizes.capacity
        assert sizes.text_capacity - 1 + block <= sizes.capacity


@pytest.mark.parametrize("name", ["language.layers.1.k.weight", "expert.norm.modulation.bias", "projector.weight"])
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(model: torch.nn.Module, name: str) -> None:
    fused = fused_of(model)
    before = fused.weights.views["language.layers.1.qkv"].clone()
    for broken in ({}, {name: torch.zeros(3, 3)}):
        state = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key != name} | broken
        with pytest.raises(InvalidInput) as refused:
            fused.weights.stage(state)
        assert name in str(refused.value.field)
        with pytest.raises(AssertionError):
            fused.weights.commit()
    assert torch.equal(fused.weights.views["language.layers.1.qkv"], before)


def test_more_than_a_bucket_holds_is_refused(model: torch.nn.Module) -> None:
    fused = fused_of(model)
    with pytest.raises(InvalidInput, match="largest bucket"):
        fused.expert_step([(0, 0)] * 5)
    with pytest.raises(InvalidInput, match="largest bucket"):
        lab.begin(fused, [lab.request(lab.TINY, 1, 25)])


def test_the_package_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU there is none."""
    import sys

    for name in [name for name in sys.modules if name.startswith(("services.inference.fused", "triton"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    import services.inference.fused.network as fresh

    assert fresh.FusedPi052 is not None


def test_pictures_as_bytes_are_seen_as_the_numbers_they_stand_for(model: torch.nn.Module) -> None:
    """Bit for bit as images.prepare() makes them for the plain module; a camera that is missing is black."""
    fused = fused_of(model, pictures_fit=True)
    generator = torch.Generator().manual_seed(3)
    shape = (lab.NUM_CAMERAS, lab.TINY.image_height, lab.TINY.image_width, 3)
    pictures = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    floats = [images.prepare(images.to_unit_range(one.numpy(), field="f"), 28, 28, field="f") for one in pictures]
    floats[1] = torch.full_like(floats[1], images.MISSING_VALUE)
    expected = fused.vision(torch.cat(floats)).clone()
    assert torch.equal(fused.vision_of_bytes([pictures[0].numpy(), None]), expected)
