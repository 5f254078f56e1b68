"""The workers of one run as one: who decides, and how gradients meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from policies.policy import Policy

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """rank of world_size workers. With more than one, torch.distributed must be initialised (Ray Train does).

    Attributes:
        device: Where this one computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, policy: Policy[Any]) -> nn.Module:
        """What forward() and backward() are called on: gradients are averaged over the workers."""
        return policy if self.world_size == 1 else DistributedDataParallel(policy)

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Rank 0's flags, on every rank: clocks and files differ, decisions must not."""
        if self.world_size == 1:
            return flags
        shared = torch.tensor([int(flag) for flag in flags], device=self.device)
        dist.broadcast(shared, src=0)
        return tuple(bool(flag) for flag in shared.tolist())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
