"""Where robots' rows live on the device: a slot holds all that one row is between two units of work.

Units take slot numbers, so joining rows of different robots in one pass, and parting them again, moves no data: a graph
reads a few integers and finds the rest. Two slots more than asked for are scratch, which fills a batch up to its bucket, and
of trials of new weights.

Shapes: N slots with those two, C keys a slot can hold, T horizon, A action size, D width of the language tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from policies.configuration import TowerSize

# Kernels read whole blocks of keys, up to so many, and mask none of their values: what is behind a row's last key must be of
# the row's own slot. Its size is rounded, so that kernels are compiled for one that 16 divides.
KEYS_READ_AT_A_TIME, KEYS_ALIGNED_TO = 128, 64


@dataclass(frozen=True, kw_only=True)
class SlotSizes:
    """Attributes:
    num_slots: Rows that can be in work at a time.
    max_prefix: Tokens of the longest prefix, pictures and prompt.
    max_text: Tokens that may be decoded behind a prefix.
    horizon: Actions of a chunk.
    """

    num_slots: int
    max_prefix: int
    max_text: int
    horizon: int

    @property
    def text_capacity(self) -> int:
        """Keys of prefix and text; the expert's own stand behind them."""
        return self.max_prefix + self.max_text

    @property
    def capacity(self) -> int:
        """Up to the end of the last block that can begin inside."""
        end = self.text_capacity + -(-self.horizon // KEYS_READ_AT_A_TIME) * KEYS_READ_AT_A_TIME
        return -(-end // KEYS_ALIGNED_TO) * KEYS_ALIGNED_TO


class Slots:
    """Attributes:
    keys, values: Per layer, (N, C, head size).
    valid: (N, C) uint8, keys that may be seen; beyond the prefix all may.
    action_keys, text_keys: (N,) int32, how many keys actions and the next text token look back at.
    action_position, text_position: (N,) int32, the position of the first action and of the next text token.
    actions: (N, T, A) float32, noise before the first Euler step and the chunk after the last.
    committed: (N, T, A) float32, of guided or trained chunking.
    pull: (N, T) float32, guidance weights; zeros: none.
    clean: (N,) int32, first actions that stay what was committed (trained chunking).
    last_hidden: (N, D), the last prompt token before the last layer, from where text starts.
    token: (N,) int64, the newest text token.
    """

    def __init__(
        self, sizes: SlotSizes, tower: TowerSize, action_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sizes = sizes
        num = sizes.num_slots + 2
        shape = (tower.depth, num, sizes.capacity, tower.head_dim)
        # Zeros, not garbage: a masked key that is not a number would spoil a row through 0 * nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.ones(num, sizes.capacity, dtype=torch.uint8, device=device)
        self.action_keys, self.text_keys, self.action_position, self.text_position, self.clean = (
            torch.zeros(num, dtype=torch.int32, device=device) for _ in range(5)
        )
        self.actions = torch.zeros(num, sizes.horizon, action_size, device=device)
        self.committed = torch.zeros_like(self.actions)
        self.pull = torch.zeros(num, sizes.horizon, device=device)
        self.last_hidden = torch.zeros(num, tower.width, dtype=dtype, device=device)
        self.token = torch.zeros(num, dtype=torch.int64, device=device)
        self._free = list(range(sizes.num_slots))[::-1]

    @property
    def scratch(self) -> int:
        return self.sizes.num_slots

    @property
    def trial(self) -> int:
        """For a version that does not serve yet: see trial.py."""
        return self.sizes.num_slots + 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None when all are in work."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        assert 0 <= slot < self.sizes.num_slots, f"no slot {slot}"
        assert slot not in self._free, f"slot {slot} was not taken"
        self._free.append(slot)

    @torch.inference_mode()
    def wipe(self, slot: int) -> None:
        """After numbers that are not finite: a masked key that is not a number would spoil whoever has the slot next."""
        for tensor in (self.keys, self.values):
            tensor[:, slot].zero_()
        for tensor in (self.actions, self.committed, self.pull, self.last_hidden):
            tensor[slot].zero_()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one pass through a tower: B rows of T tokens each.

    Attributes:
        slots: (B,) int32.
        positions: (B, T) int32.
        seen: (B,) int32, how many keys of its slot a row looks back at.
        own: (B,) int32, where in the slot a row's own keys begin.
        steps: (B,) int32, row of the modulation tables; None: tables of a single row.
        clean: (B,) int32, first tokens that take the last table row; None: none.
        sees_own: Tokens also see their row's own keys,
        causal: but none of a token behind.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor
    own: torch.Tensor
    steps: torch.Tensor | None = None
    clean: torch.Tensor | None = None
    sees_own: bool = True
    causal: bool = False

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[1]


@dataclass(kw_only=True)
class Residual:
    """The stream of a tower, (B, T, D), and a branch that is still to be added to it.

    A kernel that norms the stream reads all of it anyway: it adds what is pending on its way.

    Attributes:
        x: In place.
        parts: What the branch is the sum of, each (B, T, D), stacked; None where nothing is pending.
        gate: Table by step that the branch is multiplied with, or None.
    """

    x: torch.Tensor
    parts: torch.Tensor | None = None
    gate: torch.Tensor | None = None
