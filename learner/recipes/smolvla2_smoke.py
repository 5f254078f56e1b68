"""Seconds of training with a tiny SmolVLA2 and prompts of plain bytes, on any data with a camera: no files are needed."""

from __future__ import annotations

from policies.schedule import Schedule
from policies.smolvla2 import config

from ..recipe import Recipe


def recipe() -> Recipe:
    return Recipe(
        policy_type="smolvla2",
        policy_config=config.dump(config.TINY),
        batch_size=8,
        learning_rate=1e-3,
        schedule=Schedule(warmup_steps=10, decay_steps=100, final_share=0.1),
        max_steps=100,
        save_interval_s=2.0,
        report_every_steps=10,
    )
