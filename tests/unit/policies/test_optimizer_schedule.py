from __future__ import annotations

import pytest

from manyhands.errors import InvalidInput
from policies.schedule import PRESETS, Schedule


def test_a_short_run_shrinks_warm_up_and_decay():
    schedule = Schedule()
    assert schedule.multiplier(100, total_steps=3000) == pytest.approx(schedule.multiplier(1000, total_steps=30_000))
    assert schedule.multiplier(3000, total_steps=3000) == pytest.approx(0.1)


def test_a_run_too_short_to_warm_up_starts_at_the_peak():
    assert Schedule().multiplier(0, total_steps=20) == 1.0


def test_the_cosine_counts_from_the_first_step():
    assert Schedule().multiplier(1000, total_steps=30_000) == pytest.approx(0.9975348529)


@pytest.mark.parametrize("changes", [{"warmup_steps": -1}, {"decay_steps": 0}, {"final_share": 1.1}])
def test_settings_are_checked(changes):
    with pytest.raises(InvalidInput, match=next(iter(changes))):
        Schedule(**changes)


def test_a_run_of_no_steps_has_no_rate():
    with pytest.raises(InvalidInput, match="total_steps"):
        Schedule().multiplier(0, total_steps=0)


def test_presets():
    assert PRESETS["smolvla2"].learning_rate == 2.5e-5
    assert PRESETS["smolvla"].max_grad_norm == 10.0
    assert PRESETS["pi052"] == PRESETS["pi05"]
