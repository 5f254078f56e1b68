"""What PyTorch makes of pi052's plain module without a kernel of ours: a ruler for the engine in its own run.

Layers are compiled one by one, vision is in bfloat16 like the rest, and a chunk is one captured CUDA graph, so that launches
cost nothing. Matrices are not fused and the norms' modulations are computed at every step, as the module has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from policies.pi052 import sampling
from policies.pi052.model import Pi052Network
from services.inference.fused.graphs import GraphPool, Recorded
from tests.support import fused_lab as lab


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests with prompts of one length, stacked: (B, I, 3, height, width), (B, I) bool, (B, L), (B, T, A)."""

    pictures: torch.Tensor
    picture_valid: torch.Tensor
    tokens: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def of(cls, asked: list[lab.Request]) -> Batch:
        return cls(
            pictures=torch.stack([one.pictures for one in asked]),
            picture_valid=torch.tensor([one.picture_valid for one in asked]),
            tokens=torch.tensor([one.tokens for one in asked]),
            noise=torch.stack([one.noise for one in asked]),
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def pinned(self) -> Batch:
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


def chunks(network: Pi052Network, asked: Batch, num_steps: int) -> torch.Tensor:
    """(B, T, A) float32, by the module's own functions, all on its device."""
    prefix = network.embed_prefix(
        network.encode_pictures(asked.pictures),
        asked.picture_valid,
        asked.tokens,
        torch.ones_like(asked.tokens, dtype=torch.bool),
    )
    velocity = sampling.velocity_of(network, network.run_prefix(prefix, hidden=False))
    return sampling.guided_chunk(velocity, asked.noise, num_steps, committed=None)


def compile_layers(network: Pi052Network) -> None:
    """In place; vision becomes bfloat16. Every kind of layer and batch is compiled for itself."""
    # Beyond the limit, which counts the variants of one function, layers would silently run as they are.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    network.vision.to(torch.bfloat16)
    network.projector.to(torch.bfloat16)
    for tower in (network.vision, network.language, network.expert):
        for layer in tower.layers:
            layer.compile(dynamic=False)


class Captured:
    """Chunks of one batch's shape as one graph, from host memory to host memory."""

    def __init__(self, network: Pi052Network, asked: Batch, num_steps: int) -> None:
        device = network.action_in.weight.device

        def unit(**tensors: torch.Tensor) -> torch.Tensor:
            return chunks(network, Batch(**tensors), num_steps)

        self._recorded = Recorded(unit, vars(asked.to(device)), GraphPool(device))

    def __call__(self, asked: Batch) -> torch.Tensor:
        for name, into in self._recorded.inputs.items():
            into.copy_(getattr(asked, name), non_blocking=True)
        return self._recorded.run().cpu()
