"""SmolVLA2 fine-tuned on subtasks and actions, with the published optimiser and schedule; batch and intervals for one H200.

Begins with the checkpoint smolvla2_base in the learner's --checkpoints folder, and wants data with subtask rows.
"""

from __future__ import annotations

from ..recipe import Recipe, published


def recipe() -> Recipe:
    return published(
        "smolvla2",
        policy_config={"network": {"precision": "float32"}, "prompts": {"recipe": "subtask"}},
        start_from="smolvla2_base",
        batch_size=64,
        save_interval_s=600.0,
        max_cached_bytes=0,
    )
