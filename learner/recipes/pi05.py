"""pi05 fine-tuned on actions, with the published optimiser and schedule; batch and intervals for one H200.

Begins with the checkpoint pi05_base in the learner's --checkpoints folder.
"""

from __future__ import annotations

from ..recipe import Recipe, published


def recipe() -> Recipe:
    return published(
        "pi05",
        policy_config={"network": {"gradient_checkpointing": True, "precision": "float32"}},
        start_from="pi05_base",
        batch_size=32,
        # A checkpoint is some 66 GB: weights, and the optimiser's two moments.
        save_interval_s=1800.0,
        keep_checkpoints=2,
        max_cached_bytes=0,
    )
