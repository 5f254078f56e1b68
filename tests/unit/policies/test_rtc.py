"""Guided real-time chunking against the formulas written out with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from policies import rtc
from policies.flow_matching import draw_times, euler, interpolate
from policies.policy import CommittedPrefix
from policies.rtc import PrefixSchedule

HORIZON = 12


def expected_weights(schedule, delay, execution_horizon, length):
    end = min(execution_horizon, length, HORIZON)
    start = min(delay, end)
    weights = np.zeros(HORIZON)
    if schedule is PrefixSchedule.ZEROS:
        weights[:start] = 1
    elif schedule is PrefixSchedule.ONES:
        weights[:end] = 1
    else:
        weights[:start] = 1
        weights[start:end] = np.linspace(1, 0, end - start + 2)[1:-1]
        if schedule is PrefixSchedule.EXP:
            middle = weights[start:end]
            weights[start:end] = middle * np.expm1(middle) / (math.e - 1)
    return weights


@pytest.mark.parametrize("schedule", list(PrefixSchedule))
def test_weights_of_rows_with_their_own_delay_horizon_and_length(schedule):
    cases = [(0, 8, 12), (2, 8, 12), (8, 8, 12), (3, 10, 5), (7, 10, 5), (0, 0, 12), (4, 30, 30), (2, 8, 0), (1, 2, 9)]
    delay, horizon, length = (torch.tensor(column) for column in zip(*cases, strict=True))
    weights = rtc.prefix_weights(schedule, delay_steps=delay, execution_horizon=horizon, length=length, horizon=HORIZON)
    for row, case in enumerate(cases):
        np.testing.assert_allclose(weights[row].numpy(), expected_weights(schedule, *case), atol=1e-6, err_msg=str(case))


@pytest.mark.parametrize("time", [1.0, 0.9, 0.5, 0.1])
def test_guidance_weight(time):
    tau = 1 - time
    expected = 10.0 if tau == 0 else min(((1 - tau) / tau) * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2, 10.0)
    weight = rtc.guidance_weight(torch.tensor([time]), 10.0)
    assert float(weight) == pytest.approx(expected, rel=1e-5)


def prefix(actions, length, delay, horizon):
    return CommittedPrefix(
        actions=actions,
        length=torch.tensor(length),
        delay_steps=torch.tensor(delay),
        execution_horizon=torch.tensor(horizon),
    )


def test_guide_is_the_weighted_error_of_the_denoised_estimate():
    generator = torch.Generator().manual_seed(0)
    x, v, previous = torch.randn(3, 1, HORIZON, 2, generator=generator).unbind(0)
    committed = prefix(previous, [10], [2], [8])
    weights = rtc.prefix_weights(
        PrefixSchedule.LINEAR,
        delay_steps=committed.delay_steps,
        execution_horizon=committed.execution_horizon,
        length=committed.length,
        horizon=HORIZON,
    )
    guided = rtc.guide(v, x, torch.tensor([0.4]), committed, weights, 10.0)
    error = (previous - (x - 0.4 * v)) * torch.tensor(expected_weights(PrefixSchedule.LINEAR, 2, 8, 10))[None, :, None]
    weight = (0.4 / 0.6) * (0.16 + 0.36) / 0.16
    torch.testing.assert_close(guided, v - weight * error.float())


def test_euler_recovers_the_actions_of_a_straight_path():
    generator = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(2, 5, HORIZON, 3, generator=generator).unbind(0)
    result = euler(lambda x, t: interpolate(actions, noise, t)[1], noise, 4)
    torch.testing.assert_close(result, actions, atol=1e-6, rtol=0)


def test_guided_euler_keeps_what_will_have_been_executed_and_frees_the_rest():
    generator = torch.Generator().manual_seed(0)
    actions, noise, previous = torch.randn(3, 2, HORIZON, 3, generator=generator).unbind(0)
    committed = prefix(previous, [HORIZON, 0], [3, 3], [6, 6])
    result = euler(lambda x, t: (x - actions) / t[:, None, None], noise, 10, committed=committed)
    # Guidance pulls, it does not clamp: a tenth of the way remains.
    assert (result[0, :3] - previous[0, :3]).abs().mean() < 0.1 * (actions[0, :3] - previous[0, :3]).abs().mean()
    torch.testing.assert_close(result[0, 6:], actions[0, 6:], atol=1e-5, rtol=0)
    torch.testing.assert_close(result[1], actions[1], atol=1e-5, rtol=0)


def test_times_follow_the_beta_distribution():
    times = draw_times(200_000, torch.Generator().manual_seed(0))
    assert 0.001 <= float(times.min()) <= float(times.max()) <= 1.0
    assert float(times.mean()) == pytest.approx(0.6 * 0.999 + 0.001, abs=2e-3)
    # P(t < x) = x^1.5 for Beta(1.5, 1).
    assert float((times < 0.5).float().mean()) == pytest.approx(0.5**1.5, abs=5e-3)
