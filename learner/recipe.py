"""What a run is made of. A recipe is a function that returns a complete one; there is nothing else to configure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from manyhands.errors import InvalidInput
from policies.fast_fitting import FitSettings
from policies.schedule import PRESETS, Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Attributes:
    policy_type: Of policies/registry.py; empty where start_from says it.
    policy_config: As its from_config() takes it; with start_from, the keys that differ from the checkpoint's, also nested.
    start_from: A checkpoint whose weights, configuration, tokenizers and recipe of messages the run begins with: an
        absolute path, or one below the learner's --checkpoints folder. Normalisation is always the data's. Empty: fresh
        weights.
    fit_fast: Fits the FAST tokenizer on the data before the first step; None takes the one of start_from, if it has one.
    batch_size: Samples of an optimiser step, over all workers together.
    learning_rate: At its peak; groups of parameters scale it (Policy.parameter_groups).
    schedule: How the rate goes up and down, over max_steps.
    weight_decay, betas, epsilon: Of AdamW.
    mixed_precision: On a GPU, matrix products are of bfloat16; weights, gradients and the optimiser stay as they are.
    max_grad_norm: Longer gradients are shortened to it.
    ema_decay: Of the averaged weights, which are what is published and acts; 0 publishes the raw ones and keeps no others.
    max_steps: The run's end unless time ends it earlier.
    save_interval_s: Between checkpoints; each is published as a version.
    keep_checkpoints: Newest ones that stay on disk.
    report_every_steps: Between points of the curve.
    max_cached_bytes: Up to this size the inputs of the whole dataset stay in memory; above, every batch is prepared anew.
    """

    policy_type: str
    policy_config: Mapping[str, Any] = field(default_factory=dict)
    start_from: str = ""
    fit_fast: FitSettings | None = None
    batch_size: int
    learning_rate: float
    schedule: Schedule
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: bool = False
    ema_decay: float = 0.995
    max_steps: int
    save_interval_s: float = 10.0
    keep_checkpoints: int = 3
    report_every_steps: int = 50
    max_cached_bytes: int = 2 * 1024**3

    def __post_init__(self) -> None:
        positive = ("batch_size", "learning_rate", "max_steps", "save_interval_s", "keep_checkpoints", "report_every_steps")
        for name in (*positive, "max_grad_norm", "epsilon"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"must be > 0, not {getattr(self, name)}", field=f"recipe.{name}")
        if not 0.0 <= self.ema_decay <= 1.0:
            raise InvalidInput(f"must be between 0 and 1, not {self.ema_decay}", field="recipe.ema_decay")
        if not (self.policy_type or self.start_from):
            raise InvalidInput("is empty; name a policy, or a checkpoint in start_from", field="recipe.policy_type")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        values = json.loads(text)
        values |= {"betas": tuple(values["betas"]), "schedule": Schedule(**values["schedule"])}
        if values["fit_fast"] is not None:
            values["fit_fast"] = FitSettings(**values["fit_fast"])
        return cls(**values)


def published(policy_type: str, **settings: Any) -> Recipe:
    """A recipe with the optimiser and the schedule that the published policy of this type was trained with.

    Those keep no average of the weights; settings may say otherwise.
    """
    preset = PRESETS[policy_type]
    defaults: dict[str, Any] = {
        "policy_type": policy_type,
        "learning_rate": preset.learning_rate,
        "schedule": preset.schedule,
        "weight_decay": preset.weight_decay,
        "betas": preset.betas,
        "epsilon": preset.epsilon,
        "max_grad_norm": preset.max_grad_norm,
        "ema_decay": 0.0,
        "mixed_precision": True,
        "max_steps": preset.schedule.decay_steps,
    }
    return Recipe(**defaults | settings)
