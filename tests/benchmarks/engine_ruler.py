"""What PyTorch makes of pi052's plain module without a kernel of ours: a ruler for the engine in its own run.

Layers are compiled one by one, vision is in bfloat16 like the rest, and a chunk is one captured CUDA graph, so that launches
cost nothing. Matrices are not fused and the norms' modulations are computed at every step, as the module has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from policies.pi052 import sampling
from policies.pi052.model import Pi052Network
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

    def refill(self, other: Batch) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name), non_blocking=True)


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
        self._asked = asked.to(network.action_in.weight.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # Compiles, and allocates what libraries keep.
                chunks(network, self._asked, num_steps)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = chunks(network, self._asked, num_steps)

    def __call__(self, asked: Batch) -> torch.Tensor:
        self._asked.refill(asked)
        self._graph.replay()
        return self._made.cpu()
