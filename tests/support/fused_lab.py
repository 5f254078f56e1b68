"""Networks and requests for the tests of the fused path, and what the plain module makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from policies import rtc, text
from policies.pi052 import sampling
from policies.pi052.config import NetworkConfig, TowerSize, VisionSize
from policies.pi052.model import Pi052Network, PrefixState
from policies.policy import CommittedPrefix
from services.inference.fused import ChunkStart, FusedPi052, FusedSettings, PrefixRow, TextRow

TINY = NetworkConfig(
    vision=VisionSize(width=48, depth=2, mlp=80, heads=4, patch=14),
    language=TowerSize(width=64, depth=3, mlp=96, heads=4, head_dim=16),
    expert=TowerSize(width=32, depth=3, mlp=64, heads=4, head_dim=16),
    vocabulary=257_152,
    image_height=28,
    image_width=28,
    action_size=8,
)
NUM_CAMERAS, HORIZON, NUM_STEPS = 2, 10, 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """One robot's: what the plain module and the fused path are both asked."""

    pictures: torch.Tensor
    picture_valid: list[bool]
    tokens: list[int]
    noise: torch.Tensor
    committed: torch.Tensor | None = None
    delay_steps: int = 0
    execution_horizon: int = 0
    extra: dict[str, int] = field(default_factory=dict)


def network(config: NetworkConfig = TINY, *, seed: int = 0, device: torch.device | None = None) -> Pi052Network:
    """With every norm's weights and modulations drawn: fresh ones are zero and would hide a mistake."""
    torch.manual_seed(seed)
    with device or torch.device("cpu"):
        made = Pi052Network(config).eval().requires_grad_(False)
        for name, parameter in made.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.5 / config.expert.width**0.5)
            elif "norm" in name and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    return made


def request(
    config: NetworkConfig,
    seed: int,
    num_tokens: int,
    *,
    cameras: int = NUM_CAMERAS,
    horizon: int = HORIZON,
    lacks: int | None = None,
    committed: int = 0,
    delay_steps: int = 0,
    execution_horizon: int = 0,
) -> Request:
    generator = torch.Generator().manual_seed(seed)
    shape = (cameras, 3, config.image_height, config.image_width)
    return Request(
        pictures=torch.rand(shape, generator=generator) * 2 - 1,
        picture_valid=[camera != lacks for camera in range(cameras)],
        tokens=torch.randint(4, 200_000, (num_tokens,), generator=generator).tolist(),
        noise=torch.randn(horizon, config.action_size, generator=generator),
        committed=torch.randn(committed, config.action_size, generator=generator) if committed else None,
        delay_steps=delay_steps,
        execution_horizon=execution_horizon,
    )


def plain_state(model: Pi052Network, asked: Request, *, hidden: bool) -> PrefixState:
    device = model.action_in.weight.device
    tokens = torch.tensor([asked.tokens], device=device)
    prefix = model.embed_prefix(
        model.encode_pictures(asked.pictures[None].to(device)),
        torch.tensor([asked.picture_valid], device=device),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
    )
    return model.run_prefix(prefix, hidden=hidden)


def _committed(asked: Request, device: torch.device) -> CommittedPrefix | None:
    if asked.committed is None:
        return None
    actions = torch.zeros_like(asked.noise)[None]
    actions[0, : len(asked.committed)] = asked.committed
    return CommittedPrefix(
        actions=actions.to(device),
        length=torch.tensor([len(asked.committed)], device=device),
        delay_steps=torch.tensor([asked.delay_steps], device=device),
        execution_horizon=torch.tensor([asked.execution_horizon], device=device),
    )


@torch.inference_mode()
def plain_chunk(
    model: Pi052Network, asked: Request, num_steps: int = NUM_STEPS, *, trained_max_delay: int = 0
) -> torch.Tensor:
    device = model.action_in.weight.device
    velocity = sampling.velocity_of(model, plain_state(model, asked, hidden=False))
    committed, noise = _committed(asked, device), asked.noise[None].to(device)
    if trained_max_delay and committed is not None:
        return sampling.trained_chunk(velocity, noise, num_steps, committed=committed, max_delay=trained_max_delay)[0]
    return sampling.guided_chunk(velocity, noise, num_steps, committed=committed)[0]


@torch.inference_mode()
def plain_ids(model: Pi052Network, asked: Request, rules: text.Decoding) -> list[int]:
    return text.generate_ids(model, plain_state(model, asked, hidden=True), rules)[0]


def settings(**changes: object) -> FusedSettings:
    made = FusedSettings(
        num_cameras=NUM_CAMERAS,
        num_steps=NUM_STEPS,
        horizon=HORIZON,
        num_slots=6,
        max_text=16,
        prompt_lengths=(8, 24),
        prefix_rows=(1, 2, 4),
        expert_rows=(1, 2, 4),
        text_rows=(1, 2, 4),
        draft_length=5,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def start(one: Request, trained_max_delay: int = 0) -> ChunkStart:
    return ChunkStart.of(
        one.noise,
        committed=one.committed,
        delay_steps=one.delay_steps,
        execution_horizon=one.execution_horizon,
        schedule=rtc.PrefixSchedule.LINEAR,
        trained_max_delay=trained_max_delay,
    )


@torch.inference_mode()
def begin(fused: FusedPi052, asked: list[Request], *, together: bool = True) -> list[int]:
    """Vision, prefix and the start of a chunk for each; their slots."""
    slots = []
    rows = []
    for one in asked:
        slot = fused.slots.take()
        assert slot is not None
        slots.append(slot)
        tokens = fused.vision(one.pictures.to(fused.device)).clone()
        rows.append(PrefixRow(slot=slot, picture_tokens=tokens, picture_valid=one.picture_valid, tokens=one.tokens))
        fused.begin_chunks([(slot, start(one, fused.settings.trained_max_delay))])
    for group in [rows] if together else [[row] for row in rows]:
        fused.prefix(group)
    return slots


@torch.inference_mode()
def begin_in_slices(
    fused: FusedPi052, one: Request, between: Callable[[], None] = lambda: None, *, are_seen: bool = False
) -> int:
    """A question's prefix, and what between runs before each slice but the first; its slot.

    are_seen: vision() has seen its pictures, before all that.
    """
    slot = fused.slots.take()
    assert slot is not None
    pictures, first = one.pictures.to(fused.device), 0
    if are_seen:
        seen, first = fused.vision(pictures).flatten(0, 1).clone(), fused.num_vision_slices
        between()
        fused.begin_seen_question(slot, seen, one.picture_valid, one.tokens)
    else:
        fused.begin_question(slot, pictures, one.picture_valid, one.tokens)
    for at in range(first, fused.num_prefix_slices):
        if at > first:
            between()
        fused.prefix_slice(slot, at)
    return slot


@torch.inference_mode()
def fused_ids(fused: FusedPi052, slots: list[int], flags: int, num: int) -> list[list[int]]:
    """Greedy tokens of rows that decode together."""
    rows = [TextRow(slot=slot, flags=flags) for slot in slots]
    columns = [fused.first_text(rows)[1].tolist()]
    for _ in range(num - 1):
        columns.append(fused.text_step(rows)[1].tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
