"""Which training sample comes next: a pure function, with every (episode, frame) exactly once per epoch.

The frames of a dataset are 0 .. num_frames - 1 (`index` in the data files), and an epoch is a permutation of them. The
samples of all ranks form one sequence: position p of rank r is global position p * world_size + r. So a run resumes at
another world size from its global position alone, and no two ranks ever draw the same sample within an epoch.

The permutation is a Feistel network over the next power of four, walked until it lands below num_frames (Black and Rogaway
2002). It needs no memory, gives any position directly, and does not change with numpy's generators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput

Indices = npt.NDArray[np.int64]
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The endless sequence of samples of one rank, epoch after epoch.

    Attributes:
        num_frames: Of the dataset; at least 1.
        seed: Another seed is another order.
        rank: 0 .. world_size - 1.
        world_size: Ranks that share the sequence.
    """

    num_frames: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise InvalidInput(
                f"num_frames ({self.num_frames}) must be at least 1; publish episodes first", field="num_frames"
            )
        if self.world_size < 1:
            raise InvalidInput(f"world_size ({self.world_size}) must be at least 1", field="world_size")
        if not 0 <= self.rank < self.world_size:
            raise InvalidInput(f"rank ({self.rank}) must be 0 to {self.world_size - 1}", field="rank")

    def at_global(self, positions: npt.ArrayLike) -> Indices:
        """Frame indices at global positions, any shape; position num_frames is the second epoch's first."""
        wanted = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(wanted, self.num_frames)
        frames = np.empty_like(wanted)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            frames[chosen] = permuted(offsets[chosen], self.num_frames, seed=self.seed, epoch=int(epoch))
        return frames

    def batch(self, global_position: int, batch_size: int) -> Indices:
        """This rank's next batch_size frame indices when the ranks together have had global_position samples.

        After it they have had global_position + batch_size * world_size: every rank takes equally many, so collective steps
        stay together, and the epochs still come exactly once across ranks.
        """
        steps = np.arange(batch_size, dtype=np.int64)
        return self.at_global(global_position + steps * self.world_size + self.rank)

    def epoch_length(self) -> int:
        """Samples that this rank has in one epoch; ranks differ by at most one."""
        return (self.num_frames - self.rank + self.world_size - 1) // self.world_size

    def in_epoch(self, epoch: int, position: int, count: int) -> Indices:
        """This rank's frame indices number position, position + 1, ... of one epoch; fewer than count at its end."""
        if position < 0 or epoch < 0:
            raise InvalidInput(f"epoch ({epoch}) and position ({position}) must be >= 0", field="position")
        stop = min(position + count, self.epoch_length())
        steps = np.arange(position, max(position, stop), dtype=np.int64)
        return permuted(steps * self.world_size + self.rank, self.num_frames, seed=self.seed, epoch=epoch)


def permuted(offsets: Indices, size: int, *, seed: int, epoch: int) -> Indices:
    """Where a permutation of 0 .. size - 1, chosen by (seed, epoch), takes the offsets."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = offsets.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    # At most three in four values are walked again each time round, so the loop is short.
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    state = np.array([(seed * 0x9E3779B97F4A7C15 + epoch) & 0xFFFFFFFFFFFFFFFF], np.uint64)
    keys = []
    for _ in range(_ROUNDS):
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        keys.append(state[0])
    return keys


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
