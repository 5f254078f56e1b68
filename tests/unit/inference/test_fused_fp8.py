"""A prefix whose MLPs are multiplied in FP8, on the CPU: what is quantised, how far off it is, and what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from manyhands.errors import InvalidInput
from policies.pi052.config import NetworkConfig
from services.inference.fused import FusedPi052, fp8
from services.inference.fused.layout import layout
from services.inference.fused.units import NO_LOCATIONS
from tests.support import fused_lab as lab

CPU = torch.device("cpu")
# Of what a prefix leaves, and of chunks: an untrained expert hardly looks at the prefix.
PREFIX_TOLERANCE, CHUNK_TOLERANCE = 4e-2, 1e-3
# That of the same path without FP8.
EXACT = 1e-5
FP8_LAYERS = range(lab.TINY.language.depth - 1)


def fused_of(model: torch.nn.Module, **changes: object) -> FusedPi052:
    made = FusedPi052(lab.TINY, lab.settings(**({"fp8": True} | changes)), CPU, dtype=torch.float32)
    made.weights.refill(model.state_dict())
    return made


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return network(0)


def network(seed: int) -> torch.nn.Module:
    """With outputs of very different size: weights as drawn could share one scale."""
    made = lab.network(seed=seed)
    for name, parameter in made.named_parameters():
        if name.startswith("language.") and name.endswith(("gate.weight", "up.weight", "down.weight")):
            num_rows = parameter.shape[0]
            parameter.mul_(torch.logspace(-1, 0.5, num_rows)[torch.randperm(num_rows)][:, None])
    return made


def requests() -> list[lab.Request]:
    return [
        lab.request(lab.TINY, 1, 5),
        lab.request(lab.TINY, 2, 20, committed=7, delay_steps=2, execution_horizon=6),
        lab.request(lab.TINY, 3, 24, lacks=1),
    ]


def after_a_prefix(fused: FusedPi052, slot: int, num_tokens: int) -> list[torch.Tensor]:
    """Keys and values of a prefix by layer, and the logits of the first text token."""
    logits, _ = fused.first_text([lab.TextRow(slot=slot, flags=NO_LOCATIONS)])
    length = lab.NUM_CAMERAS * lab.TINY.num_patches + num_tokens
    kept = [
        pool[layer, slot, :length]
        for layer in range(lab.TINY.language.depth)
        for pool in (fused.slots.keys, fused.slots.values)
    ]
    return [*(tensor.clone() for tensor in kept), logits[0][logits[0].isfinite()]]


def chunk(fused: FusedPi052, slot: int) -> torch.Tensor:
    for step in range(lab.NUM_STEPS):
        fused.expert_step([(slot, step)])
    return fused.slots.actions[slot].clone()


def test_a_prefix_and_its_chunk_are_off_by_what_is_rounded_and_no_more(model: torch.nn.Module) -> None:
    fused, exact = fused_of(model), fused_of(model, fp8=False)
    for one in requests():
        (slot,), (other,) = lab.begin(fused, [one]), lab.begin(exact, [one])
        found, expected = (after_a_prefix(*of, len(one.tokens)) for of in ((fused, slot), (exact, other)))
        errors = [lab.relative(*pair) for pair in zip(found, expected, strict=True)]
        print("keys, values by layer, logits:", *(f"{error:.1e}" for error in errors))
        assert max(errors[:2]) < EXACT  # Before the first MLP.
        assert min(errors[2:]) > 1e-3
        assert max(errors) < PREFIX_TOLERANCE
        error = lab.relative(chunk(fused, slot), lab.plain_chunk(model, one))
        print(f"chunk: {error:.1e}")
        assert EXACT < error < CHUNK_TOLERANCE
        fused.slots.give_back(slot)
        exact.slots.give_back(other)


def test_text_behind_a_prefix_and_the_expert_are_not_quantised(model: torch.nn.Module) -> None:
    fused, exact, one = fused_of(model), fused_of(model, fp8=False), requests()[1]
    (slot,), (other,) = lab.begin(fused, [one]), lab.begin(exact, [one])
    for ours, theirs in ((fused.slots.keys, exact.slots.keys), (fused.slots.values, exact.slots.values)):
        ours[:, slot] = theirs[:, other]
    fused.slots.last_hidden[slot] = exact.slots.last_hidden[other]
    for step in range(3):
        logits, expected = (
            (of.text_step if step else of.first_text)([lab.TextRow(slot=at, flags=0)])[0]
            for of, at in ((fused, slot), (exact, other))
        )
        assert torch.equal(logits, expected)
    assert torch.equal(chunk(fused, slot), chunk(exact, other))


def test_a_row_has_the_same_bits_beside_a_neighbour_of_another_size(model: torch.nn.Module) -> None:
    """Its scales are its own."""
    fused, (one, *others) = fused_of(model), requests()
    others.append(replace(others[0], pictures=others[0].pictures * 100))
    found = []
    for other in others:
        slots = lab.begin(fused, [one, other])
        found.append(after_a_prefix(fused, slots[0], len(one.tokens)))
        for slot in slots:
            fused.slots.give_back(slot)
    for again in found[1:]:
        for ours, theirs in zip(again, found[0], strict=True):
            assert torch.equal(ours, theirs)


def test_a_prefix_in_slices_leaves_the_bits_of_a_whole_one(model: torch.nn.Module) -> None:
    fused = fused_of(model, prefix_slices=5)
    for one in requests():
        [slot] = lab.begin(fused, [one])
        expected = after_a_prefix(fused, slot, len(one.tokens))
        fused.slots.give_back(slot)
        slot = lab.begin_in_slices(fused, one)
        for sliced, whole in zip(after_a_prefix(fused, slot, len(one.tokens)), expected, strict=True):
            assert torch.equal(sliced, whole)
        fused.slots.give_back(slot)


def quantised_mlps(fused: FusedPi052) -> list[torch.Tensor]:
    """As bytes, copied: values and scales of all layers."""
    mlps = [layer.fp8 for layer in fused.weights.language if layer.fp8 is not None]
    matrices = [matrix for mlp in mlps for matrix in (mlp.gate_up, mlp.down)]
    return [tensor.view(torch.uint8).clone() for matrix in matrices for tensor in (matrix.values, matrix.scale)]


def test_quantised_weights_come_with_a_version_and_go_with_it(model: torch.nn.Module) -> None:
    other = network(9)
    fused, before = fused_of(model), quantised_mlps(fused_of(model))
    after = quantised_mlps(fused_of(other))
    assert len(before) == 4 * len(FP8_LAYERS)
    assert fused.weights.language[-1].fp8 is None  # A prefix does not run it.
    where = {name: view.data_ptr() for name, view in fused.weights.views.items()}

    def serves(expected: list[torch.Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(quantised_mlps(fused), expected, strict=True))

    fused.weights.stage(other.state_dict())
    assert serves(before)
    fused.weights.commit()
    assert serves(after)
    fused.weights.stage(model.state_dict())
    fused.weights.commit()
    assert serves(before)
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert where == {name: view.data_ptr() for name, view in fused.weights.views.items()}


@pytest.mark.parametrize("layer", FP8_LAYERS)
def test_every_output_of_a_weight_keeps_its_own_precision(model: torch.nn.Module, layer: int) -> None:
    made = fused_of(model).weights.language[layer]
    assert made.fp8 is not None
    for kept, quantised in ((made.gate_up, made.fp8.gate_up), (made.down, made.fp8.down)):
        restored = quantised.values.float() * quantised.scale
        assert ((restored - kept).norm(dim=1) / kept.norm(dim=1)).max() < 4e-2
        assert torch.equal(quantised.values.float().abs().amax(dim=1), torch.full((len(kept),), fp8.LARGEST))


def test_rows_of_zeros_stay_zeros_and_what_is_not_a_number_stays_one() -> None:
    rows = torch.zeros(3, 32)
    rows[1, 4], rows[1, 5], rows[2, 6] = torch.nan, 2.0, torch.inf
    weight = fp8.quantized(torch.ones(16, 32))
    found = fp8.product(fp8.quantized(rows), weight)
    assert torch.equal(found[0], torch.zeros(16))
    assert found[1:].isnan().all()


def test_the_option_adds_entries_behind_the_others_and_changes_none() -> None:
    config = NetworkConfig()
    plain, more = (layout(config, 10, torch.bfloat16, fp8=asked) for asked in (False, True))
    names = list(plain.entries)
    assert not any("fp8" in name for name in names)
    assert list(more.entries)[: len(names)] == names
    assert all(more.entries[name] == plain.entries[name] and more.offsets[name] == plain.offsets[name] for name in names)
    assert 1.70e9 < more.num_bytes - plain.num_bytes < 1.73e9


def test_a_network_that_matrix_units_cannot_multiply_in_fp8_is_refused() -> None:
    config = replace(lab.TINY, language=replace(lab.TINY.language, mlp=104))
    with pytest.raises(InvalidInput, match="multiples of 16"):
        layout(config, 4, torch.float32, fp8=True)
    layout(config, 4, torch.float32)
