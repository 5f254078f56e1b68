"""Seconds of training with a tiny flow policy: shows that store, Ray, checkpoints and publishing work on a machine."""

from __future__ import annotations

from policies.schedule import Schedule

from ..recipe import Recipe


def recipe() -> Recipe:
    return Recipe(
        policy_type="flow",
        policy_config={"width": 32, "num_blocks": 1, "horizon": 8},
        batch_size=16,
        learning_rate=1e-3,
        schedule=Schedule(warmup_steps=10, decay_steps=200, final_share=0.05),
        max_steps=200,
        save_interval_s=0.5,
        report_every_steps=20,
    )
