"""The network and the requests that the fused path is held to on a GPU: sizes of heads are the full ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policies.pi052.config import NetworkConfig, Precision, TowerSize, VisionSize
from policies.pi052.model import Pi052Network
from services.inference.fused import FusedPi052
from services.inference.units import EXPERT_SIZES
from tests.support import fused_lab as lab

CUDA = torch.device("cuda")
TOLERANCE = 1e-2
HORIZON = 50
SIZES = NetworkConfig(
    vision=VisionSize(width=144, depth=2, mlp=304, heads=2, patch=14),
    language=TowerSize(width=256, depth=3, mlp=512),
    expert=TowerSize(width=128, depth=3, mlp=256),
    vocabulary=257_152,
    image_height=112,
    image_width=112,
    action_size=32,
    precision=Precision.BFLOAT16,
)


def fused_of(model: Pi052Network, **changes: object) -> FusedPi052:
    asked: dict[str, object] = {"horizon": HORIZON, "num_slots": 20, "prompt_lengths": (48, 200), "max_text": 128}
    asked |= {"prefix_rows": (1, 2, 4), "expert_rows": EXPERT_SIZES, "text_rows": (1, 4, 32)}
    dtype = changes.pop("dtype", torch.bfloat16)
    assert isinstance(dtype, torch.dtype)
    kernels = changes.pop("kernels", None)
    assert kernels is None or isinstance(kernels, bool)
    device = model.action_in.weight.device
    made = FusedPi052(model.config, lab.settings(**(asked | changes)), device, dtype=dtype, kernels=kernels)
    made.weights.refill(model.state_dict())
    return made


def mixed_requests(num: int, longest: int = 200, *, sizes: NetworkConfig = SIZES) -> list[lab.Request]:
    """Prompts of different lengths, missing cameras, committed prefixes with different delays and horizons."""
    lengths = [5, longest, 31, longest // 2]
    return [
        lab.request(
            sizes,
            seed,
            lengths[seed % 4],
            horizon=HORIZON,
            lacks=1 if seed % 3 == 2 else None,
            committed=(0, 20, 50, 3)[seed % 4],
            delay_steps=seed % 7,
            execution_horizon=10 + seed,
        )
        for seed in range(num)
    ]


def staggered(fused: FusedPi052, slots: Sequence[int], most: int) -> None:
    """All chunks, up to most rows in a pass, rows at different steps."""
    steps = dict.fromkeys(slots, 0)
    tick = 0
    while waiting := [slot for slot in slots if steps[slot] < lab.NUM_STEPS]:
        chosen = [slot for n, slot in enumerate(waiting) if n <= tick][:most]
        fused.expert_step([(slot, steps[slot]) for slot in chosen])
        for slot in chosen:
            steps[slot] += 1
        tick += 1
