"""The small flow policy on a few demonstrations of several Meta-World tasks, in about a minute on two CPU cores."""

from __future__ import annotations

from policies.schedule import Schedule

from ..recipe import Recipe


def recipe() -> Recipe:
    return Recipe(
        policy_type="flow",
        policy_config={},
        batch_size=128,
        learning_rate=1e-3,
        schedule=Schedule(warmup_steps=100, decay_steps=8000, final_share=0.05),
        weight_decay=1e-4,
        ema_decay=0.995,
        max_steps=8000,
        save_interval_s=10.0,
    )
