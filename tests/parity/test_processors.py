"""Row 14 and what stands around the networks: rates, bins, locations, normalisation, relative actions, FAST."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policies.normalization import Normalization, Normalizer, relative_mask, to_absolute, to_relative
from policies.prompts import locations
from policies.prompts.messages import state_bins
from policies.schedule import PRESETS, Schedule

from . import golden, golden_text

LIMIT = 1e-6
RATE_LIMIT = 1e-9


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(golden.folder() / "misc.safetensors")


def test_learning_rate_multipliers() -> None:
    for case in golden_text.read("misc.json")["lr"]:
        schedule = Schedule(
            warmup_steps=case["num_warmup_steps"],
            decay_steps=case["num_decay_steps"],
            final_share=case["decay_lr"] / case["peak_lr"],
        )
        for step, expected in case["multipliers"]:
            assert schedule.multiplier(step, total_steps=case["total_steps"]) == pytest.approx(expected, rel=RATE_LIMIT)


def test_presets_are_the_references() -> None:
    for case in golden_text.read("misc.json")["lr"]:
        preset = PRESETS[case["preset"]]
        assert preset.learning_rate == case["peak_lr"]
        assert preset.schedule.warmup_steps == case["num_warmup_steps"]
        assert preset.schedule.decay_steps == case["num_decay_steps"]
        assert preset.schedule.final_share == pytest.approx(case["decay_lr"] / case["peak_lr"])


def test_state_bins() -> None:
    for case in golden_text.read("prompts_pi052.json")["state_bins"]:
        assert state_bins(np.array(case["values"], dtype=np.float32)) == case["text"]


def test_answers_to_location_tokens() -> None:
    for case in golden_text.read("prompts_pi052.json")["vqa_to_loc"]:
        assert locations.from_json(json.dumps(case["answer"])) == case["text"], case


@pytest.mark.parametrize("mode", list(Normalization))
def test_normalisation(tensors: dict[str, torch.Tensor], mode: Normalization) -> None:
    statistics = {key.removeprefix("norm.stats."): t.numpy() for key, t in tensors.items() if key.startswith("norm.stats.")}
    normalizer = Normalizer(mode, tensors["norm.x"].shape[-1])
    normalizer.set(statistics, field="action")
    for found, expected in (
        (normalizer.normalize(tensors["norm.x"]), tensors[f"norm.{mode.name}.forward"]),
        (normalizer.unnormalize(tensors["norm.y"]), tensors[f"norm.{mode.name}.inverse"]),
    ):
        # The constant dimension is huge on purpose: it must not hide the others.
        for dim in range(found.shape[-1]):
            assert golden.relative_error(found[..., dim], expected[..., dim]) < LIMIT


def test_relative_actions(tensors: dict[str, torch.Tensor]) -> None:
    actions = tensors["rel.action"]
    size = actions.shape[-1]
    state = tensors["rel.state"][:, :size]
    for case in golden_text.read("misc.json")["relative"]:
        mask = relative_mask(size, case["action_names"], case["exclude_joints"])
        assert mask.tolist() == case["mask"]
        relative = to_relative(actions, state, torch.from_numpy(mask))
        assert golden.relative_error(relative, tensors[f"{case['key']}.relative"]) < LIMIT
        absolute = to_absolute(relative, state, torch.from_numpy(mask))
        assert golden.relative_error(absolute, tensors[f"{case['key']}.absolute"]) < LIMIT


def test_fast_codes(tensors: dict[str, torch.Tensor]) -> None:
    fixture = golden_text.read("misc.json")["fast"]
    tokenizer = golden_text.fast_tokenizer()
    actions = tensors["fast.actions"].numpy()
    for chunk, coefficients, codes in zip(actions, tensors["fast.coefficients"].numpy(), fixture["codes"], strict=True):
        assert (tokenizer.coefficients(chunk) == coefficients).all()
        assert tokenizer.encode(chunk) == codes
    decoded = torch.from_numpy(np.stack([tokenizer.decode(codes) for codes in fixture["codes"]]))
    assert golden.relative_error(decoded, tensors["fast.decoded"]) < LIMIT
    rmse = float(((decoded - tensors["fast.actions"]) ** 2).mean().sqrt())
    assert rmse == pytest.approx(fixture["rmse"], rel=1e-5)
