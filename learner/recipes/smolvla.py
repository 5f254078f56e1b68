"""SmolVLA fine-tuned on actions, with the published optimiser and schedule; batch and intervals for one H200.

Begins with the checkpoint smolvla_base in the learner's --checkpoints folder.
"""

from __future__ import annotations

from ..recipe import Recipe, published


def recipe() -> Recipe:
    return published(
        "smolvla",
        policy_config={"network": {"precision": "float32"}},
        start_from="smolvla_base",
        batch_size=64,
        save_interval_s=600.0,
        max_cached_bytes=0,
    )
