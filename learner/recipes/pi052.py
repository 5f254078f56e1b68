"""pi052 fine-tuned on subtasks and actions, with the published optimiser and schedule; batch and intervals for one H200.

Begins with the checkpoint pi052_base in the learner's --checkpoints folder, fits the FAST tokenizer on the data, and wants
data with subtask rows. Other annotations: another name in prompts.recipe.
"""

from __future__ import annotations

from policies.fast_fitting import FitSettings

from ..recipe import Recipe, published


def recipe() -> Recipe:
    return published(
        "pi052",
        policy_config={
            "network": {"gradient_checkpointing": True, "precision": "float32"},
            "prompts": {"recipe": "subtask"},
        },
        start_from="pi052_base",
        fit_fast=FitSettings(),
        batch_size=32,
        # A checkpoint is some 66 GB: weights, and the optimiser's two moments.
        save_interval_s=1800.0,
        keep_checkpoints=2,
        max_cached_bytes=0,
    )
