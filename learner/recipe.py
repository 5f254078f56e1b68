"""What a run is made of. A recipe is a function that returns a complete one; there is nothing else to configure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from manyhands.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Attributes:
    policy_type: Of policies/registry.py.
    policy_config: As its from_config() takes it.
    batch_size: Samples of an optimiser step, over all workers together.
    learning_rate: At its peak; groups of parameters scale it (Policy.parameter_groups).
    final_learning_rate_share: Of the peak, at the end of the cosine.
    warmup_steps: Rising linearly to the peak.
    ema_decay: Of the averaged weights, which are what is published and acts; 0 publishes the raw ones.
    max_steps: The run's end, and the cosine's, unless time ends it earlier.
    save_interval_s: Between checkpoints; each is published as a version.
    keep_checkpoints: Newest ones that stay on disk.
    report_every_steps: Between points of the curve.
    max_cached_bytes: Up to this size the inputs of the whole dataset stay in memory; above, every batch is prepared anew.
    """

    policy_type: str
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int
    learning_rate: float
    final_learning_rate_share: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    max_steps: int
    save_interval_s: float = 10.0
    keep_checkpoints: int = 3
    report_every_steps: int = 50
    max_cached_bytes: int = 2 * 1024**3

    def __post_init__(self) -> None:
        positive = ("batch_size", "learning_rate", "max_steps", "save_interval_s", "keep_checkpoints", "report_every_steps")
        for name in (*positive, "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"must be > 0, not {getattr(self, name)}", field=f"recipe.{name}")
        for name in ("ema_decay", "final_learning_rate_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidInput(f"must be between 0 and 1, not {getattr(self, name)}", field=f"recipe.{name}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        values = json.loads(text)
        return cls(**values | {"betas": tuple(values["betas"])})
