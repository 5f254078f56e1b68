"""Sizes and settings of pi052 and pi05.

pi05 is the same network without a text head in use: no text loss, no FAST loss, no generated text.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from manyhands.errors import InvalidInput

from .. import configuration
from ..configuration import STRICT, NonNegative, Positive, PositiveInt, Precision, TowerSize, VisionSize
from ..normalization import Normalization
from ..prompts.settings import Pi052PromptSettings
from ..rtc import PrefixSchedule


class ChunkMode(enum.Enum):
    """What real-time chunking does with the committed prefix."""

    GUIDED = "guided"  # Pulls every step towards it; works with any weights.
    TRAINED = "trained"  # Keeps it as it is, at time 0; needs weights trained with trained_prefix_max_delay > 0.


TOWERS = {
    "gemma_2b": TowerSize(width=2048, depth=18, mlp=16384),
    "gemma_300m": TowerSize(width=1024, depth=18, mlp=4096),
}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What fixes the shapes of the weights, and their precision.

    Attributes:
        image_height, image_width: Pixels a camera is brought to; multiples of vision.patch.
        action_size: Numbers of an action inside the model, A; the robot's are padded with zeros.
        min_period, max_period: Of the sines that embed flow time.
        gradient_checkpointing: Training recomputes each layer instead of keeping its activations.
    """

    __pydantic_config__ = STRICT

    vision: VisionSize = field(default_factory=VisionSize)
    language: TowerSize = TOWERS["gemma_2b"]
    expert: TowerSize = TOWERS["gemma_300m"]
    vocabulary: PositiveInt = 257152
    image_height: PositiveInt = 224
    image_width: PositiveInt = 224
    action_size: PositiveInt = 32
    min_period: Positive = 4e-3
    max_period: Positive = 4.0
    precision: Precision = Precision.FLOAT32
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        configuration.check_vision(self.vision, self.image_height, self.image_width)
        configuration.check_towers(self.language, self.expert)

    @property
    def num_patches(self) -> int:
        """Tokens of one camera."""
        return (self.image_height // self.vision.patch) * (self.image_width // self.vision.patch)


@dataclass(frozen=True, kw_only=True)
class Pi052Config:
    """Defaults are pi052's; pi05_config() has pi05's.

    Attributes:
        horizon: Actions in a chunk, T.
        num_steps: Euler steps of a chunk.
        prompt_length: Tokens a prompt is padded to in training.
        num_empty_cameras: Cameras named observation.images.empty_camera_i that no robot has; always masked.
        relative_actions: The model sees action minus state, but for actions whose name holds one of relative_exclude.
        flow_repeats: Noises and times per sample and training step, K; they share one prefix.
        flow_weight, text_weight, fast_weight, z_weight: Of the loss terms; fast_weight 0 leaves FAST tokens out altogether.
        knowledge_insulation: The flow loss does not train what the expert reads.
        fast_skip_tokens: FAST codes lie so far below the end of the vocabulary.
        trained_prefix_max_delay: Training keeps up to so many first actions clean, for ChunkMode.TRAINED.
        train_expert_only, freeze_vision: What does not train.
        byte_prompts: Prompts without a tokenizer, for tests: policies/byte_prompts.py.
        prompts: Else: what they are made of.
        backbone_lr_scale, expert_lr_scale, head_lr_scale: Factors on the learning rate of vision and language
        tower; of the expert with the action and time projections; of text head and token table.
    """

    __pydantic_config__ = STRICT

    network: NetworkConfig = field(default_factory=NetworkConfig)
    horizon: PositiveInt = 50
    num_steps: PositiveInt = 10
    prompt_length: PositiveInt = 200
    num_empty_cameras: Annotated[int, Field(ge=0, le=16)] = 0
    state_normalization: Normalization = Normalization.QUANTILES
    action_normalization: Normalization = Normalization.QUANTILES
    relative_actions: bool = False
    relative_exclude: tuple[str, ...] = ("gripper",)
    flow_repeats: PositiveInt = 5
    flow_weight: NonNegative = 10.0
    text_weight: NonNegative = 1.0
    fast_weight: NonNegative = 1.0
    z_weight: NonNegative = 1e-4
    knowledge_insulation: bool = True
    fast_skip_tokens: Annotated[int, Field(ge=0)] = 1152
    trained_prefix_max_delay: Annotated[int, Field(ge=0)] = 0
    train_expert_only: bool = False
    freeze_vision: bool = False
    backbone_lr_scale: NonNegative = 1.0
    expert_lr_scale: NonNegative = 1.0
    head_lr_scale: NonNegative = 1.0
    chunk_mode: ChunkMode = ChunkMode.GUIDED
    prefix_schedule: PrefixSchedule = PrefixSchedule.LINEAR
    max_guidance_weight: NonNegative = 10.0
    max_new_tokens: PositiveInt = 128
    byte_prompts: bool = False
    prompts: Pi052PromptSettings = field(default_factory=lambda: Pi052PromptSettings(recipe="subtask_mem"))

    def __post_init__(self) -> None:
        if self.trained_prefix_max_delay >= self.horizon:
            raise InvalidInput(
                f"is {self.trained_prefix_max_delay}, must be < horizon ({self.horizon})", field="trained_prefix_max_delay"
            )
        if self.chunk_mode is ChunkMode.TRAINED and not self.trained_prefix_max_delay:
            raise InvalidInput("'trained' needs trained_prefix_max_delay > 0; use 'guided'", field="chunk_mode")
        if self.train_expert_only and (self.text_weight > 0 or self.fast_weight > 0):
            raise InvalidInput(
                "needs text_weight and fast_weight 0: both train the language tower", field="train_expert_only"
            )


def pi05_config(**changes: Any) -> Pi052Config:
    """pi05's defaults: flow matching alone, once per sample, its gradient free to reach every weight."""
    defaults: dict[str, Any] = {
        "flow_repeats": 1,
        "flow_weight": 1.0,
        "text_weight": 0.0,
        "fast_weight": 0.0,
        "z_weight": 0.0,
        "knowledge_insulation": False,
        "prompts": Pi052PromptSettings(),
    }
    return Pi052Config(**(defaults | changes))


# A network of some ten thousand weights, for tests of what all policies promise.
TINY = Pi052Config(
    network=NetworkConfig(
        vision=VisionSize(width=16, depth=1, mlp=32, heads=2, patch=8),
        language=TowerSize(width=32, depth=2, mlp=32, heads=2, head_dim=16),
        expert=TowerSize(width=16, depth=2, mlp=32, heads=2, head_dim=16),
        vocabulary=516,
        image_height=16,
        image_width=16,
        action_size=8,
    ),
    horizon=8,
    num_steps=4,
    prompt_length=96,
    flow_repeats=2,
    byte_prompts=True,
)

_CONFIG = TypeAdapter(Pi052Config)


def parse(values: Mapping[str, Any]) -> Pi052Config:
    """From the JSON-able form; InvalidInput names the key."""
    return configuration.parse(_CONFIG, values)


def dump(config: Pi052Config) -> dict[str, Any]:
    return configuration.dump(_CONFIG, config)
