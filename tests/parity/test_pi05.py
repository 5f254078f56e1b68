"""pi05 against the golden fixtures: rows 1 to 5 of the parity table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policies import losses, rows
from policies.pi052 import flow, sampling
from policies.pi052 import model as pi052_model
from policies.pi052.policy import Pi052Policy
from policies.policy import CommittedPrefix
from policies.rtc import PrefixSchedule

from . import pi
from .golden import Golden, relative_error


def test_prepared_pictures(pi05_golden: Golden) -> None:
    errors = pi.measure_pictures(pi05_golden)
    assert max(errors.values()) <= pi.PICTURE_LIMIT, errors


def test_the_missing_camera_comes_last_black_and_masked(pi05_golden: Golden) -> None:
    missing = pi05_golden.meta["missing_camera"]["missing0"]
    pictures = pi.pictures_of(pi05_golden, without=missing)
    assert pictures.names[-1] == missing
    assert (pictures.values[-1] == -1.0).all()
    assert not pictures.valid[-1].any()


def _cases(golden: Golden) -> list[str]:
    """All cameras, and each one missing."""
    cases = golden.cases(".prefix.emb")
    assert set(cases) == {"all", *golden.meta["missing_camera"]}
    return cases


def test_prefix(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    for case in _cases(pi05_golden):
        errors = pi.measure_prefix(pi05, pi05_golden, f"{case}.")
        assert max(errors.values()) <= pi.AIM, (case, errors)


def test_flow_tensor(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    for case in _cases(pi05_golden):
        errors = pi.measure_flow_tensor(pi05, pi05_golden, case)
        assert len(errors) == len(pi05_golden["in.time"])
        assert max(errors.values()) <= pi.AIM, (case, errors)


def test_time_embedding_and_condition(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    errors = pi.measure_time(pi05, pi05_golden)
    assert errors["time_emb"] <= pi.TIME_LIMIT, errors
    assert errors["adarms_cond"] <= pi.AIM, errors


def test_time_embedding_against_float64() -> None:
    time = torch.rand(64, generator=torch.Generator().manual_seed(0))
    period = 4e-3 * 1000.0 ** torch.linspace(0, 1, 512, dtype=torch.float64)
    angle = 2 * torch.pi * time.double()[:, None] / period
    exact = torch.cat([angle.sin(), angle.cos()], dim=1)
    assert relative_error(pi052_model.embed_time(time, 1024, 4e-3, 4.0), exact) < 1e-7


def test_chunks(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    for case in _cases(pi05_golden):
        errors = pi.measure_chunks(pi05, pi05_golden, case)
        assert f"{case}.chunk.4" in errors
        assert max(errors.values()) <= pi.AIM, (case, errors)


def test_guided_real_time_chunking(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    errors = pi.measure_guided(pi05, pi05_golden)
    assert {key.rpartition(".")[2] for key in errors} == {"ZEROS", "ONES", "LINEAR", "EXP"}
    assert max(errors.values()) <= pi.AIM, errors


def test_training_loss_is_the_mean_over_the_robots_own_numbers(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    draws = flow.Draws(noise=pi05_golden["in.noise"], time=pi05_golden["in.time"][0])
    found = pi05.loss_of(pi.inputs_of(pi05_golden), draws)
    expected = pi05_golden["all.flow.0"][..., : pi05_golden.config["action_dim"]]
    assert relative_error(found.total.detach(), expected.mean()) <= pi.LOSS_AIM
    assert relative_error(found.terms["flow"].detach(), expected.mean(dim=(1, 2))) <= pi.LOSS_AIM


# -- a delay per row -------------------------------------------------------------------------------------------------


def _three_rows(golden: Golden) -> torch.Tensor:
    """Of the fixture's; some twice if it has fewer."""
    return torch.arange(3) % golden["in.action"].shape[0]


@pytest.mark.parametrize("schedule", list(PrefixSchedule))
@torch.no_grad()
def test_guidance_has_a_delay_per_row(pi05: Pi052Policy, pi05_golden: Golden, schedule: PrefixSchedule) -> None:
    """One batch: a row as in the fixture, one without a previous chunk, one with a delay and a horizon of its own."""
    golden = pi05_golden
    case = next(c for c in golden.meta["rtc"] if c["schedule"] == schedule.name and c["steps"] == 4)
    delay, execution_horizon = case["inference_delay"], case["execution_horizon"]
    of_fixture = _three_rows(golden)
    count = golden["in.action"].shape[0]
    whole = pi.committed_of(golden, [0] * count, [0] * count)
    length = int(whole.length[0])
    committed = CommittedPrefix(
        actions=whole.actions[of_fixture],
        length=torch.tensor([length, 0, length - 1]),
        delay_steps=torch.tensor([delay, 2, delay + 1]),
        execution_horizon=torch.tensor([execution_horizon, execution_horizon, execution_horizon + 1]),
    )
    inputs = rows.select(pi.acting(pi.inputs_of(golden)), of_fixture)
    noise = golden["in.noise"][of_fixture]

    def chunk(index: torch.Tensor) -> torch.Tensor:
        of_index = rows.select(inputs, index)
        return sampling.guided_chunk(
            sampling.velocity_of(pi05.network, pi05.prefix_state(of_index, hidden=False)),
            noise[index],
            case["steps"],
            committed=pi05.anchored(rows.select(committed, index), of_index),
            schedule=schedule,
            max_guidance_weight=case["max_guidance_weight"],
        )

    together = chunk(torch.arange(3))
    as_in_fixture = golden[case["key"]][of_fixture]
    assert relative_error(together[0], as_in_fixture[0]) <= pi.AIM
    assert relative_error(together[1], golden["all.chunk.4"][of_fixture[1]]) <= pi.AIM
    assert relative_error(together[2], chunk(torch.tensor([2]))[0]) <= pi.AIM
    assert relative_error(together[2], as_in_fixture[2]) > 1e-3, "row 2 should differ from the fixture's delay"


@torch.no_grad()
def test_trained_prefix_per_row(pi05_golden: Golden) -> None:
    """Against a loop over single rows that knows nothing of batches."""
    golden = pi05_golden
    limit = golden.config["chunk_size"] - 2
    policy = pi.build(golden, trained_prefix_max_delay=limit)
    of_fixture = _three_rows(golden)
    count = golden["in.action"].shape[0]
    committed = rows.select(pi.committed_of(golden, [0] * count, [0] * count), of_fixture)
    # The second asks for more than it has, the last for more than training ever kept.
    length = int(committed.length[0])
    committed = replace(committed, delay_steps=torch.tensor([0, 3, 99]), length=torch.tensor([length, 2, length]))
    inputs, noise = rows.select(pi.acting(pi.inputs_of(golden)), of_fixture), golden["in.noise"][of_fixture]
    committed = policy.anchored(committed, inputs)
    state = policy.prefix_state(inputs, hidden=False)
    velocity = sampling.velocity_of(policy.network, state)
    together = sampling.trained_chunk(velocity, noise, 4, committed=committed, max_delay=limit)

    for row, kept in enumerate([0, 2, limit]):
        assert torch.equal(together[row, :kept], committed.actions[row, :kept])
        x = noise.clone()
        for step in range(4):
            x[row, :kept] = committed.actions[row, :kept]
            time = torch.full(x.shape[:2], 1 - step / 4)
            time[:, :kept] = 0.0
            x = x - 0.25 * policy.network.expert_step(state, x[:, None], time[:, None])[:, 0]
        x[row, :kept] = committed.actions[row, :kept]
        assert relative_error(together[row], x[row]) <= pi.AIM
    free = golden["all.chunk.4"][of_fixture]
    assert relative_error(together[0], free[0]) <= pi.AIM
    assert relative_error(together[1, 2:], free[1, 2:]) > 1e-3, "the kept actions should be seen"


@torch.no_grad()
def test_a_time_per_action_is_the_same_as_one_per_row_when_all_are_equal(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    state = pi05.prefix_state(pi.acting(pi.inputs_of(pi05_golden)), hidden=False)
    x, time = pi05_golden["in.noise"][:, None], pi05_golden["in.time"][0][:, None]
    per_row = pi05.network.expert_step(state, x, time)
    per_action = pi05.network.expert_step(state, x, time[:, :, None].expand(x.shape[:3]))
    assert relative_error(per_action, per_row) <= pi.AIM


def test_training_with_a_clean_prefix(pi05_golden: Golden) -> None:
    """The kept actions reach the network clean, at time 0, and the loss is the mean over all others of the batch."""
    golden = pi05_golden
    policy = pi.build(golden, trained_prefix_max_delay=3)
    inputs = pi.inputs_of(golden)
    kept = [(0, 1, 3)[row % 3] for row in range(inputs.tokens.shape[0])]
    assert inputs.actions is not None
    time = golden["in.time"][0]
    draws = flow.Draws(noise=golden["in.noise"], time=time, clean=torch.tensor(kept))
    found = policy.loss_of(inputs, draws)

    x = time[:, None, None] * golden["in.noise"] + (1 - time[:, None, None]) * inputs.actions
    times = time[:, None].repeat(1, x.shape[1])
    counted = torch.ones_like(times, dtype=torch.bool)
    for row, count in enumerate(kept):
        x[row, :count] = inputs.actions[row, :count]
        times[row, :count] = 0.0
        counted[row, :count] = False
    state = policy.prefix_state(inputs, hidden=False)
    velocity = policy.network.expert_step(state, x[:, None], times[:, None])[:, 0]
    errors = (golden["in.noise"] - inputs.actions - velocity).square()[..., : golden.config["action_dim"]].detach()
    assert relative_error(found.total.detach(), errors[counted].mean()) <= pi.LOSS_AIM
    for row in range(len(kept)):
        assert relative_error(found.terms["flow"][row].detach(), errors[row][counted[row]].mean()) <= pi.LOSS_AIM


def test_clean_prefixes_are_drawn_up_to_the_limit() -> None:
    draws = flow.draw(4000, 5, 3, 3, torch.Generator().manual_seed(0))
    assert draws.clean is not None
    assert torch.bincount(draws.clean).tolist() == pytest.approx([1000] * 4, rel=0.15)
    assert flow.draw(8, 5, 3, 0, torch.Generator()).clean is None


def test_padded_numbers_do_not_count() -> None:
    errors = torch.zeros(2, 1, 3, 32)
    errors[..., 7:] = 1e6
    assert losses.flow_term(errors, torch.tensor([True, True]), action_size=7).mean == 0
