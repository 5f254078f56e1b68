"""Learning rates of a run by step, and what the published policies were trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from manyhands.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor on the learning rate by step: up in a line, then down along a cosine that counts from step 0.

    Attributes:
        warmup_steps, decay_steps: Of a run of at least decay_steps; a shorter one shrinks both.
        final_share: Of the peak, from decay_steps on.
    """

    warmup_steps: int = 1000
    decay_steps: int = 30_000
    final_share: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InvalidInput(f"is {self.warmup_steps}, must be >= 0", field="warmup_steps")
        if self.decay_steps <= 0:
            raise InvalidInput(f"is {self.decay_steps}, must be > 0", field="decay_steps")
        if not 0.0 <= self.final_share <= 1.0:
            raise InvalidInput(f"is {self.final_share}, must be between 0 and 1", field="final_share")

    def multiplier(self, step: int, *, total_steps: int) -> float:
        """At step, from 0, of a run of total_steps."""
        if total_steps <= 0:
            raise InvalidInput(f"is {total_steps}, must be > 0", field="total_steps")
        warmup, decay = self.warmup_steps, self.decay_steps
        if total_steps < decay:
            warmup, decay = int(warmup * total_steps / decay), total_steps
        if step < warmup:
            first = 1.0 / (warmup + 1)
            return first + (1.0 - first) * step / warmup
        return self.decayed(min(step, decay) / decay)

    def decayed(self, share: float) -> float:
        """The cosine alone, at share 0 to 1 of its way."""
        return (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * share)) + self.final_share


@dataclass(frozen=True, kw_only=True)
class OptimizerPreset:
    """AdamW's settings; groups of parameters scale the rate (Policy.parameter_groups)."""

    learning_rate: float
    schedule: Schedule
    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8


_PI = OptimizerPreset(learning_rate=2.5e-5, schedule=Schedule(final_share=0.1), weight_decay=0.01, max_grad_norm=1.0)
PRESETS = {
    "pi05": _PI,
    "pi052": _PI,
    "smolvla": OptimizerPreset(
        learning_rate=1e-4, schedule=Schedule(final_share=0.025), weight_decay=1e-10, max_grad_norm=10.0
    ),
    "smolvla2": OptimizerPreset(
        learning_rate=2.5e-5, schedule=Schedule(final_share=0.1), weight_decay=1e-10, max_grad_norm=10.0
    ),
}
