"""What a chunk begins with, as one run of numbers that travels to the device in one piece.

Shapes: T horizon, A action size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from policies import rtc


@dataclass(frozen=True, kw_only=True)
class ChunkStart:
    """Attributes:
    numbers: (2 * T * A + T,) float32: noise, what is committed (zeros beyond its length), and guidance weights.
    num_clean: First actions that stay what was committed (trained chunking).
    """

    numbers: npt.NDArray[np.float32]
    num_clean: int

    @classmethod
    def of(
        cls,
        noise: torch.Tensor,
        *,
        committed: torch.Tensor | None = None,
        delay_steps: int = 0,
        execution_horizon: int = 0,
        schedule: rtc.PrefixSchedule = rtc.PrefixSchedule.LINEAR,
        trained_max_delay: int = 0,
    ) -> ChunkStart:
        """See rtc.prefix_weights and sampling.clean_prefix.

        Args:
            noise: (T, A) float32 on the CPU.
            committed: (length, A) float32 on the CPU, still to be executed of the previous chunk; None or empty: nothing.
            trained_max_delay: > 0: trained chunking keeps up to so many committed actions; 0: guided chunking.
        """
        horizon, size = noise.shape
        numbers = np.zeros(num_numbers(horizon, size), dtype=np.float32)
        numbers[: noise.numel()] = noise.reshape(-1).numpy()
        length = 0 if committed is None else min(len(committed), horizon)
        if committed is None or length == 0:
            return cls(numbers=numbers, num_clean=0)
        numbers[noise.numel() :][: length * size] = committed[:length].reshape(-1).numpy()
        if trained_max_delay:
            return cls(numbers=numbers, num_clean=max(0, min(delay_steps, length, trained_max_delay)))
        weights = rtc.prefix_weights(
            schedule,
            delay_steps=torch.tensor([delay_steps]),
            execution_horizon=torch.tensor([execution_horizon]),
            length=torch.tensor([length]),
            horizon=horizon,
        )
        numbers[2 * noise.numel() :] = weights[0].numpy()
        return cls(numbers=numbers, num_clean=0)


def num_numbers(horizon: int, action_size: int) -> int:
    """Of a ChunkStart."""
    return 2 * horizon * action_size + horizon
