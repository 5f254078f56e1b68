"""Sizes and settings of SmolVLA2 and SmolVLA.

SmolVLA is the same network without a text head in use: no text loss, no generated text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from manyhands.errors import InvalidInput

from .. import configuration
from ..configuration import STRICT, NonNegative, Positive, PositiveInt, Precision, TowerSize, VisionSize
from ..normalization import Normalization
from ..prompts.settings import PromptSettings
from ..rtc import DEFAULT_MAX_GUIDANCE_WEIGHT, PrefixSchedule

# SmolVLM2-500M: SigLIP-B/16, and the first half of its 32 language layers.
VISION = VisionSize(width=768, depth=12, mlp=3072, heads=12, patch=16)
LANGUAGE = TowerSize(width=960, depth=16, mlp=2560, heads=15, kv_heads=5, head_dim=64)
EXPERT_MLP_MULTIPLE = 256


def expert_size(language: TowerSize, width_multiplier: float = 0.75) -> TowerSize:
    """A tower that many times as wide, its MLP two thirds of four times the width, rounded up."""
    width = int(language.width * width_multiplier)
    mlp = -(-int(4 * int(2 * width / 3)) // EXPERT_MLP_MULTIPLE) * EXPERT_MLP_MULTIPLE
    return TowerSize(
        width=width,
        depth=language.depth,
        mlp=mlp,
        heads=language.heads,
        kv_heads=language.kv_heads,
        head_dim=language.head_dim,
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What fixes the shapes of the weights, what is computed with them, and their precision.

    Attributes:
        image_height, image_width: Pixels a camera is brought to; multiples of vision.patch * shuffle.
        shuffle: The connector makes one token of shuffle x shuffle patches.
        state_size, action_size: Numbers of state and action inside the model; the robot's are padded with zeros.
        self_attention_every: Expert layers whose number is a multiple of it attend to the prefix and to the actions
            before; the others to the prefix alone, through projections of their own. 0: all are of the second kind.
        prefix_length: The prefix is padded to so many tokens, which changes no result; 0: not at all.
        image_special_tokens: Each camera's tokens stand between special ones.
        min_period, max_period: Of the sines that embed flow time.
        gradient_checkpointing: Training recomputes each layer instead of keeping its activations.
    """

    __pydantic_config__ = STRICT

    vision: VisionSize = field(default_factory=lambda: VISION)
    language: TowerSize = field(default_factory=lambda: LANGUAGE)
    expert: TowerSize = field(default_factory=lambda: expert_size(LANGUAGE))
    vocabulary: PositiveInt = 49280
    rms_eps: Positive = 1e-5
    image_height: PositiveInt = 512
    image_width: PositiveInt = 512
    shuffle: PositiveInt = 4
    state_size: PositiveInt = 32
    action_size: PositiveInt = 32
    self_attention_every: Annotated[int, Field(ge=0)] = 2
    prefix_length: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    image_special_tokens: bool = False
    min_period: Positive = 4e-3
    max_period: Positive = 4.0
    precision: Precision = Precision.FLOAT32
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        configuration.check_vision(self.vision, self.image_height, self.image_width, patches_in_cell=self.shuffle)
        configuration.check_towers(self.language, self.expert)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a camera."""
        return self.image_height // self.vision.patch, self.image_width // self.vision.patch

    def is_self_layer(self, index: int) -> bool:
        """Of an expert layer: it attends to the actions before too."""
        return self.self_attention_every > 0 and index % self.self_attention_every == 0


@dataclass(frozen=True, kw_only=True)
class SmolVLA2Config:
    """Defaults are SmolVLA2's; smolvla_config() has SmolVLA's.

    Attributes:
        horizon: Actions in a chunk, T.
        num_steps: Euler steps of a chunk.
        prompt_length: Tokens a prompt is padded to.
        num_empty_cameras: Cameras named observation.images.empty_camera_i that no robot has; always masked.
        flow_weight, text_weight: Of the loss terms; text_weight 0 leaves the text head untrained.
        padded_steps_dilute: Steps beyond an episode's end count as errors of zero, as SmolVLA2 has it; else they do not
            count at all, as SmolVLA has it.
        train_expert_only, freeze_vision, train_state: What does not train, and whether the state's projection does.
        byte_prompts: Prompts without a tokenizer, for tests: policies/byte_prompts.py.
        prompts: Else: what they are made of.
    """

    __pydantic_config__ = STRICT

    network: NetworkConfig = field(default_factory=NetworkConfig)
    horizon: PositiveInt = 50
    num_steps: PositiveInt = 10
    prompt_length: PositiveInt = 48
    num_empty_cameras: Annotated[int, Field(ge=0, le=16)] = 0
    state_normalization: Normalization = Normalization.MEAN_STD
    action_normalization: Normalization = Normalization.MEAN_STD
    flow_weight: NonNegative = 5.0
    text_weight: NonNegative = 1.0
    padded_steps_dilute: bool = True
    train_expert_only: bool = False
    freeze_vision: bool = True
    train_state: bool = True
    prefix_schedule: PrefixSchedule = PrefixSchedule.LINEAR
    max_guidance_weight: NonNegative = DEFAULT_MAX_GUIDANCE_WEIGHT
    max_new_tokens: PositiveInt = 256
    byte_prompts: bool = False
    prompts: PromptSettings = field(default_factory=lambda: PromptSettings(recipe="subtasks_vqa"))

    def __post_init__(self) -> None:
        if self.train_expert_only and self.text_weight > 0:
            raise InvalidInput("needs text_weight 0: text trains the language tower", field="train_expert_only")


def smolvla_config(**changes: Any) -> SmolVLA2Config:
    """SmolVLA's defaults: flow matching alone, and only the expert trains."""
    defaults: dict[str, Any] = {
        "flow_weight": 1.0,
        "text_weight": 0.0,
        "padded_steps_dilute": False,
        "train_expert_only": True,
        "prompts": PromptSettings(),
    }
    return SmolVLA2Config(**(defaults | changes))


_TINY_TOWER = TowerSize(width=32, depth=3, mlp=32, heads=4, kv_heads=2, head_dim=8)
# A network of some ten thousand weights, for tests of what all policies promise.
TINY = SmolVLA2Config(
    network=NetworkConfig(
        vision=VisionSize(width=16, depth=1, mlp=32, heads=2, patch=8),
        language=_TINY_TOWER,
        expert=TowerSize(width=16, depth=3, mlp=32, heads=4, kv_heads=2, head_dim=8),
        vocabulary=516,
        image_height=16,
        image_width=16,
        shuffle=2,
        state_size=8,
        action_size=8,
    ),
    horizon=8,
    num_steps=4,
    prompt_length=64,
    freeze_vision=False,
    byte_prompts=True,
)

_CONFIG = TypeAdapter(SmolVLA2Config)


def parse(values: Mapping[str, Any]) -> SmolVLA2Config:
    """From the JSON-able form; InvalidInput names the key."""
    return configuration.parse(_CONFIG, values)


def dump(config: SmolVLA2Config) -> dict[str, Any]:
    return configuration.dump(_CONFIG, config)
