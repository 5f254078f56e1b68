"""SmolVLA against the golden fixtures: rows 1, 5 and 11 of the parity table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policies import rows
from policies.configuration import TowerSize
from policies.smolvla2.config import LANGUAGE, NetworkConfig, expert_size
from policies.smolvla2.connector import shuffle_patches
from policies.smolvla2.model import SmolVLA2Network
from policies.smolvla2.policy import SmolVLA2Policy

from . import pi, smol
from .golden import Golden, relative_error


def test_prepared_pictures(smolvla_golden: Golden) -> None:
    errors = smol.measure_pictures(smolvla_golden)
    assert errors
    assert max(errors.values()) <= smol.PICTURE_LIMIT, errors


def _cases(golden: Golden) -> list[str]:
    """All cameras, each one missing, and the first one masked in some rows."""
    cases = golden.cases(".prefix.emb")
    assert set(cases) == {"all", "masked0", *golden.meta["missing_camera"]}
    return cases


def test_prefix(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    for case in _cases(smolvla_golden):
        errors = smol.measure_prefix(smolvla, smolvla_golden, f"{case}.")
        assert max(errors.values()) <= smol.AIM, (case, errors)


def test_suffix(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    errors = smol.measure_suffix(smolvla, smolvla_golden)
    assert max(errors.values()) <= smol.AIM, errors


def test_flow_tensor(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    for case in _cases(smolvla_golden):
        errors = smol.measure_flow_tensor(smolvla, smolvla_golden, case)
        assert len(errors) == len(smolvla_golden["in.time"])
        assert max(errors.values()) <= smol.AIM, (case, errors)


def test_chunks(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    for case in _cases(smolvla_golden):
        errors = smol.measure_chunks(smolvla, smolvla_golden, f"{case}.")
        assert f"{case}.chunk.4" in errors
        assert max(errors.values()) <= smol.AIM, (case, errors)


def test_guided_real_time_chunking(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    errors = smol.measure_guided(smolvla, smolvla_golden)
    assert {key.rpartition(".")[2] for key in errors} == {"ZEROS", "ONES", "LINEAR", "EXP"}
    assert max(errors.values()) <= smol.AIM, errors


@torch.no_grad()
def test_guidance_has_a_delay_per_row(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    """One batch: a row as in the fixture, one without a previous chunk, one with a delay of its own."""
    golden = smolvla_golden
    case = next(c for c in golden.meta["rtc"] if c["schedule"] == "LINEAR" and c["steps"] == 4)
    count, delay = golden["in.noise"].shape[0], case["inference_delay"]
    of_fixture = torch.arange(3) % count
    whole = pi.committed_of(golden, [delay] * count, [case["execution_horizon"]] * count)
    length, (late, mixed) = whole.length[of_fixture], torch.tensor([[delay + 1] * 3, [delay, delay, delay + 1]])
    length[1] = 0
    three = rows.select(whole, of_fixture)
    together = smol.guided_chunk(smolvla, golden, case, replace(three, length=length, delay_steps=mixed), of_fixture)
    as_in_fixture, free = golden[case["key"]][of_fixture], golden[f"all.chunk.{case['steps']}"][of_fixture]
    assert relative_error(together[0], as_in_fixture[0]) <= smol.AIM
    assert relative_error(together[1], free[1]) <= smol.AIM
    assert relative_error(together[2], as_in_fixture[2]) > 1e-3, "row 2 should differ from the fixture's delay"
    other = smol.guided_chunk(smolvla, golden, case, replace(three, delay_steps=late), of_fixture)
    assert relative_error(together[2], other[2]) <= smol.AIM


@torch.no_grad()
def test_act_guides_like_the_steps(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    golden = smolvla_golden
    case = next(c for c in golden.meta["rtc"] if c["schedule"] == "LINEAR")
    count = golden["in.noise"].shape[0]
    committed = pi.committed_of(golden, [case["inference_delay"]] * count, [case["execution_horizon"]] * count)
    policy = smol.build(golden, max_guidance_weight=case["max_guidance_weight"])
    chunk = policy.act(smol.acting(smol.inputs_of(golden)), golden["in.noise"], committed, case["steps"])
    assert relative_error(chunk, golden[case["key"]]) <= smol.AIM


def test_losses(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    assert {"masked", "unmasked"} <= smolvla_golden.meta["cases"].keys()
    for case in smolvla_golden.meta["cases"]:
        errors = smol.measure_losses(smolvla, smolvla_golden, case)
        assert max(errors.values()) <= smol.LOSS_AIM, (case, errors)


def test_gradients(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    for case in smolvla_golden.meta["grads"]:
        errors = smol.measure_gradients(smolvla, smolvla_golden, case)
        assert max(errors.values()) <= smol.GRADIENT_LIMIT, max(errors, key=lambda name: errors[name])


def test_what_does_not_train(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    assert smol.frozen_names(smolvla) == set(smolvla_golden.meta["frozen"])


def test_only_the_expert_trains_by_default(smolvla_golden: Golden) -> None:
    frozen = smol.frozen_names(smol.build(smolvla_golden, train_expert_only=True, freeze_vision=True))
    assert frozen == {name for name in smolvla_golden.weights if ".vlm." in name}
    stateless = smol.frozen_names(smol.build(smolvla_golden, train_expert_only=True, train_state=False))
    assert stateless - frozen == {"model.state_proj.weight", "model.state_proj.bias"}


# -- properties that no number of a fixture shows ----------------------------------------------------------------------


@torch.no_grad()
def test_padding_of_the_prefix_changes_nothing(smolvla_golden: Golden) -> None:
    golden = smolvla_golden
    long = smol.build(golden, network_prefix_length=golden["all.prefix.emb"].shape[1] + 5)
    prefix = long.embed_prefix(smol.acting(smol.inputs_of(golden)), golden["in.observation.state"])
    assert prefix.embeddings.shape[1] == golden["all.prefix.emb"].shape[1] + 5
    assert not prefix.valid[:, -5:].any()
    assert max(smol.measure_flow_tensor(long, golden, "all").values()) <= smol.AIM


@torch.no_grad()
def test_special_tokens_stand_around_each_picture(smolvla_golden: Golden) -> None:
    golden = smolvla_golden
    inputs = smol.acting(smol.inputs_of(golden, "masked0"))
    built = [smol.build(golden, network_image_special_tokens=on, network_prefix_length=0) for on in (False, True)]
    plain, marked = (policy.embed_prefix(inputs, inputs.state) for policy in built)
    table = golden.weights["model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"]
    cameras = inputs.pictures.shape[1]
    tokens = (plain.embeddings.shape[1] - inputs.tokens.shape[1] - 1) // cameras
    for camera in range(cameras):
        begin = camera * (tokens + 3)
        assert torch.equal(marked.embeddings[0, begin : begin + 2], table[[49189, 49152]])
        assert torch.equal(marked.embeddings[0, begin + 2 + tokens], table[49189])
        inner = marked.embeddings[:, begin + 2 : begin + 2 + tokens]
        assert torch.equal(inner, plain.embeddings[:, camera * tokens : (camera + 1) * tokens])
    assert marked.valid.sum() == plain.valid.sum() + 3 * cameras * len(inputs.tokens)


@torch.no_grad()
def test_later_actions_do_not_reach_earlier_ones(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    seen = smolvla.network.seen(smolvla.action_state(smol.acting(smol.inputs_of(smolvla_golden))))
    x, time = smolvla_golden["in.noise"], smolvla_golden["in.time"][0]
    changed = x.clone()
    changed[:, 2] += 1.0
    before, after = smolvla.network.expert_step(seen, x, time), smolvla.network.expert_step(seen, changed, time)
    assert torch.equal(before[:, :2], after[:, :2])
    assert all(relative_error(after[:, step], before[:, step]) > 1e-4 for step in range(2, x.shape[1]))


def test_shuffled_patches_go_row_by_row_with_channels_last() -> None:
    patches = torch.arange(4 * 6).view(1, 24, 1)
    cells = shuffle_patches(patches, (4, 6), 2)
    assert cells[0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert cells[0].tolist()[3] == [12, 13, 18, 19]


@pytest.mark.parametrize(("width", "expected"), [(0.75, (720, 2048)), (0.5, (480, 1280))])
def test_size_of_the_expert(width: float, expected: tuple[int, int]) -> None:
    size: TowerSize = expert_size(LANGUAGE, width)
    assert (size.width, size.mlp) == expected


@torch.no_grad()
def test_full_size_fits_together() -> None:
    """Shapes alone, on the meta device: three cameras, 48 tokens and the state, as lerobot's smolvla_base."""
    with torch.device("meta"):
        network = SmolVLA2Network(NetworkConfig())
        pictures = network.encode_pictures(torch.zeros(1, 3, 3, 512, 512))
        assert pictures.shape == (1, 3, 64, 960)
        tokens = torch.zeros(1, 48, dtype=torch.int64)
        valid, seen_pictures = torch.ones(1, 48, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
        prefix = network.embed_prefix(pictures, seen_pictures, tokens, valid, torch.zeros(1, 6))
        assert prefix.embeddings.shape == (1, 241, 960)
        state = network.run_prefix(prefix, hidden=True)
        velocity = network.expert_step(network.seen(state), torch.zeros(1, 50, 32), torch.ones(1))
        assert velocity.shape == (1, 50, 32)
        assert state.hidden is not None
        assert network.text_logits(state.hidden[:, prefix.language]).shape == (1, 48, 49280)
