"""The small policy, type "flow": flow matching over action chunks from numbers, an instruction and, if wanted, cameras.

A context (state, instruction, pictures) is made once a chunk; the velocity network, residual blocks over the whole chunk,
runs once an Euler step. It trains in a minute on two CPU cores and serves a chunk in a few milliseconds, with everything the
large policies have: normalisation inside, guided real-time chunking per row, rows that do not see each other.

Shapes: B rows, H horizon, A action size (the model's and the robot's are the same), S state size, C cameras, P picture size,
V text buckets, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, TypeAdapter
from torch import nn
from torch.nn import functional

from manyhands.errors import InvalidInput
from manyhands.spec import Feature, Spec

from . import configuration, flow_matching, images, rows, text_features, vectors
from . import samples as sample_checks
from .configuration import STRICT
from .normalization import Normalization, Normalizer, Statistics
from .policy import CommittedPrefix, Losses, Policy, Sample

# Rows are computed in blocks of this many, the last one filled up: a matrix kernel chosen for another batch size adds in
# another order, and a robot's chunk must be the same bits whoever else is served. Four rows cost about as much as one.
ROWS_PER_BLOCK = 4
# Normalised numbers beyond this are cut: outside the demonstrations the network has nothing to say about how far.
STATE_LIMIT = 5.0
TIME_FREQUENCIES = 16

PositiveInt = Annotated[int, Field(gt=0, le=65536)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Attributes:
    horizon: Actions in a chunk, H.
    cameras: Names of the cameras that are inputs; empty for a policy on numbers alone.
    picture_size: Cameras come down to this square, P.
    picture_features: Numbers kept of each picture.
    picture_dropout: Share of training samples that see no pictures, so that numbers and instruction carry the task.
    width, num_blocks: Of the velocity network.
    text_buckets, text_size: Of the instruction's hashed features and their embedding.
    num_steps: Euler steps.
    state_noise: Standard deviation of what training adds to normalised numbers.
    min_std_fraction: A number's standard deviation counts at least this share of the largest one: what hardly moved in
        the demonstrations must not be magnified. Numbers of one unit share one (their root mean square).
    max_guidance_weight: Of real-time chunking.
    """

    __pydantic_config__ = STRICT

    horizon: PositiveInt = 16
    cameras: tuple[str, ...] = ()
    picture_size: Annotated[int, Field(ge=16, le=256, multiple_of=8)] = 32
    picture_features: PositiveInt = 32
    picture_dropout: Fraction = 0.75
    width: PositiveInt = 256
    num_blocks: PositiveInt = 3
    text_buckets: PositiveInt = 512
    text_size: PositiveInt = 64
    num_steps: PositiveInt = 10
    state_noise: Annotated[float, Field(ge=0.0)] = 0.05
    min_std_fraction: Fraction = 0.01
    state_normalization: Normalization = Normalization.MEAN_STD
    action_normalization: Normalization = Normalization.MEAN_STD
    max_guidance_weight: Annotated[float, Field(ge=0.0)] = 10.0


_CONFIG = TypeAdapter(FlowConfig)


@dataclass(frozen=True, kw_only=True)
class FlowInputs:
    """Attributes:
    state: (B, S) float32, normalised.
    text: (B, V) float32 bag of hashed features, length 1.
    pictures: (B, C, 3, P, P) uint8.
    picture_present: (B, C) bool.
    actions: (B, H, A) float32, normalised; None when acting.
    is_pad: (B, H) bool; None when acting.
    """

    state: torch.Tensor
    text: torch.Tensor
    pictures: torch.Tensor
    picture_present: torch.Tensor
    actions: torch.Tensor | None = None
    is_pad: torch.Tensor | None = None


class FlowPolicy(Policy[FlowInputs]):
    """See the module's text. Policy's docstrings say what each method promises."""

    type_name: ClassVar[str] = "flow"
    masks_missing_cameras: ClassVar[bool] = True

    def __init__(self, config: FlowConfig, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.horizon = config.horizon
        self.cameras = _cameras(config, spec)
        self.state_size = vectors.size(spec.states)
        if not self.state_size:
            raise InvalidInput("a flow policy needs at least one vector of numbers", field="spec.observation")
        self.model_action_size = vectors.size(spec.action)
        self.state_normalizer = Normalizer(config.state_normalization, self.state_size)
        self.action_normalizer = Normalizer(config.action_normalization, self.model_action_size)

        chunk_size = config.horizon * self.model_action_size
        self.state_in = nn.Linear(self.state_size, config.width)
        # The instruction scales and shifts what the state says: each task has a linear map of its own.
        self.text_in = nn.Linear(config.text_buckets, config.text_size, bias=False)
        self.text_out = nn.Linear(config.text_size, 2 * config.width)
        self.encoders = nn.ModuleList(_picture_encoder(config.picture_features) for _ in self.cameras)
        self.picture_in = (
            nn.Linear(config.picture_features * len(self.cameras), config.width, bias=False) if self.cameras else None
        )
        self.chunk_in = nn.Linear(chunk_size, config.width)
        self.time_in = nn.Linear(2 * TIME_FREQUENCIES, config.width)
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.num_blocks))
        self.chunk_out = nn.Linear(config.width, chunk_size)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> FlowPolicy:
        return cls(configuration.parse(_CONFIG, config), spec)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        return {"width": 32, "num_blocks": 1, "horizon": 8, "num_steps": 4}

    def config_dict(self) -> dict[str, Any]:
        return configuration.dump(_CONFIG, self.config)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        state = vectors.join_statistics(statistics, self.spec.states)
        if self.config.state_normalization is Normalization.MEAN_STD:
            shared = _shared_by_unit(state["std"], self.spec.states)
            state["std"] = np.maximum(shared, self.config.min_std_fraction * shared.max())
        self.state_normalizer.set(state, field="observation")
        self.action_normalizer.set(vectors.join_statistics(statistics, self.spec.action), field="action")

    def used_observations(self) -> frozenset[str]:
        return frozenset(feature.name for feature in (*self.spec.states, *self.cameras))

    def preprocess(self, samples: Sequence[Sample], device: torch.device) -> FlowInputs:
        sample_checks.check(samples, self.spec)
        state = sample_checks.states(samples, self.spec.states)
        text = np.stack([_text(sample.task, self.config.text_buckets) for sample in samples])
        size = self.config.picture_size
        pictures = np.zeros((len(samples), len(self.cameras), 3, size, size), dtype=np.uint8)
        present = np.zeros((len(samples), len(self.cameras)), dtype=np.bool_)
        for row, sample in enumerate(samples):
            for column, feature in enumerate(self.cameras):
                if feature.name in sample.observation:
                    pictures[row, column] = _fit(sample.observation[feature.name], size, feature.name).transpose(2, 0, 1)
                    present[row, column] = True
        actions = sample_checks.actions(samples, self.horizon, self.model_action_size)
        is_pad = None if actions is None else sample_checks.is_pad(samples, self.horizon)
        return FlowInputs(
            state=self.state_normalizer.normalize(torch.from_numpy(state).to(device)).clamp(-STATE_LIMIT, STATE_LIMIT),
            text=torch.from_numpy(text).to(device),
            pictures=torch.from_numpy(pictures).to(device),
            picture_present=torch.from_numpy(present).to(device),
            actions=None if actions is None else self.action_normalizer.normalize(torch.from_numpy(actions).to(device)),
            is_pad=None if is_pad is None else torch.from_numpy(is_pad).to(device),
        )

    def loss(self, inputs: FlowInputs, generator: torch.Generator) -> Losses:
        if inputs.actions is None or inputs.is_pad is None:
            raise InvalidInput("training needs samples with actions and is_pad", field="actions")
        device = inputs.state.device
        num_rows = inputs.state.shape[0]
        noise = torch.randn(inputs.actions.shape, generator=generator).to(device)
        time = flow_matching.draw_times(num_rows, generator).to(device)
        state_noise = torch.randn(inputs.state.shape, generator=generator).to(device) * self.config.state_noise
        seen = (torch.rand(num_rows, generator=generator) >= self.config.picture_dropout).to(device)
        context = self._context(inputs, inputs.state + state_noise, seen)
        x, target = flow_matching.interpolate(inputs.actions, noise, time)
        squared = (self._velocity(context, x, time) - target).square().mean(dim=2)
        valid = (~inputs.is_pad).float()
        flow = (squared * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1.0)
        return Losses(total=flow.mean(), terms={"flow": flow})

    @torch.no_grad()
    def act(
        self,
        inputs: FlowInputs,
        noise: torch.Tensor,
        committed: CommittedPrefix | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        num_rows = noise.shape[0]
        chunks: list[torch.Tensor] = []
        for start in range(0, num_rows, ROWS_PER_BLOCK):
            end = min(start + ROWS_PER_BLOCK, num_rows)
            # The last row fills up the block: its own result does not depend on the copies.
            index = torch.arange(start, start + ROWS_PER_BLOCK, device=noise.device).clamp(max=end - 1)
            block = rows.select(inputs, index)
            context = self._context(block, block.state, None)
            chunk = flow_matching.euler(
                functools.partial(self._velocity, context),
                noise[index],
                num_steps or self.config.num_steps,
                committed=None if committed is None else rows.select(committed, index),
                max_guidance_weight=self.config.max_guidance_weight,
            )
            chunks.append(chunk[: end - start])
        return torch.cat(chunks)

    @torch.no_grad()
    def postprocess(self, chunk: torch.Tensor, inputs: FlowInputs) -> npt.NDArray[np.float32]:
        actions: npt.NDArray[np.float32] = self.action_normalizer.unnormalize(chunk).float().cpu().numpy()
        return actions

    def _context(self, inputs: FlowInputs, state: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """(B, D). seen (B,) bool: rows whose pictures count; None when acting, where all do."""
        scale, shift = self.text_out(self.text_in(inputs.text)).chunk(2, dim=1)
        context: torch.Tensor = self.state_in(state) * (1.0 + scale) + shift
        if self.picture_in is None:
            return context
        if seen is None:
            return context + cast(torch.Tensor, self.picture_in(self._look(inputs)))
        looking = seen.nonzero().squeeze(1)
        if len(looking):  # Only the rows that look pay for the encoders.
            context = context.index_add(0, looking, self.picture_in(self._look(rows.select(inputs, looking))))
        return context

    def _look(self, inputs: FlowInputs) -> torch.Tensor:
        """(B, C * picture_features), zero where a camera is absent."""
        features = []
        for column, encoder in enumerate(self.encoders):
            pixels = inputs.pictures[:, column].float() / 127.5 - 1.0
            features.append(encoder(pixels) * inputs.picture_present[:, column, None])
        return torch.cat(features, dim=1)

    def _velocity(self, context: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, H, A) at x (B, H, A) and time (B,)."""
        hidden = self.chunk_in(x.flatten(1)) + self.time_in(_time_features(time)) + context
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.chunk_out(hidden)
        return out.view_as(x)


class _Block(nn.Module):
    """A residual block that starts as nothing.

    Without normalisation layers and with these zeros the network begins as a linear map and bends only where data ask for
    it: ten demonstrations of a task then reach further than they do with LayerNorm (docs/design/0010-policy-interface.md).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(functional.silu(self.up(hidden)))
        return out


def _picture_encoder(num_features: int) -> nn.Module:
    """(B, 3, P, P) in -1..1 to (B, num_features)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, num_features),
    )


def _time_features(time: torch.Tensor) -> torch.Tensor:
    """(B, 2 * TIME_FREQUENCIES) sines and cosines, periods 4 down to 1/250 as in pi0."""
    exponents = torch.linspace(0.0, 1.0, TIME_FREQUENCIES, device=time.device)
    angles = time[:, None] * (2.0 * math.pi / 4.0) * torch.pow(250.0, exponents)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@functools.lru_cache(maxsize=1024)
def _text(task: str, num_buckets: int) -> npt.NDArray[np.float32]:
    return text_features.hashed_bag(task, num_buckets)


def _cameras(config: FlowConfig, spec: Spec) -> tuple[Feature, ...]:
    known = {feature.name: feature for feature in spec.images}
    for name in config.cameras:
        if name not in known:
            raise InvalidInput(
                f"{name!r} is not a camera of the spec: {', '.join(known) or 'it has none'}", field="config.cameras"
            )
    return tuple(known[name] for name in config.cameras)


def _fit(picture: npt.NDArray[np.generic], size: int, name: str) -> npt.NDArray[np.uint8]:
    """(size, size, 3) uint8: scaled with its ratio kept, centred on black. A squashed picture is another robot's picture."""
    picture = images.check(picture, field=name)
    height, width = picture.shape[:2]
    ratio = size / max(height, width)
    new_height, new_width = max(1, round(height * ratio)), max(1, round(width * ratio))
    scaled = cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_AREA)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = scaled
    return canvas


def _shared_by_unit(std: npt.NDArray[np.float64], features: Sequence[Feature]) -> npt.NDArray[np.float64]:
    """(S,) the root mean square over the numbers of the same unit; those without a unit keep their own.

    The distance of two positions is what most tasks are about: it must not depend on which of the two moved more.
    """
    units = [unit for feature in features for unit in (feature.element_units or ("",) * feature.shape[0])]
    shared = std.copy()
    for unit in set(units) - {""}:
        same = np.array([other == unit for other in units])
        shared[same] = np.sqrt(np.mean(np.square(std[same])))
    return shared
