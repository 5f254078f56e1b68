"""What serving, learning and local acting know of a policy.

Shapes: B rows (robots or samples), H horizon, A action size of the model, R action size of the robot.

A policy holds its own normalisation: what goes in and comes out of preprocess() and postprocess() is in the robot's units,
what act() and loss() see is model space. It keeps no state between calls, so one instance serves many robots (rule 4), and
every source of randomness is an argument, so that a remote chunk equals a local one bit for bit.
"""

from __future__ import annotations

import abc
import enum
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Spec

from .files import Files

Arrays = Mapping[str, npt.NDArray[np.generic]]
InputsT = TypeVar("InputsT")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One observation, and for training what followed it.

    Attributes:
        observation: Arrays by feature name, in the robot's units; cameras (height, width, 3) uint8 RGB of any size. A camera
            of the policy's spec that is absent is masked: the policy acts without it. A camera that is not in the spec is an
            error. Numbers must all be there; vectors that are not in the spec are not looked at.
        task: The instruction in force; when a text head chose a subtask, that subtask. Acting, an empty one is an empty
            prompt, which is right for a policy that knows one task; training with a recipe, it is a missing one.
        actions: (H, R) float32 in the robot's units, or None when acting.
        is_pad: (H,) bool, True beyond the episode's end, or None when acting.
        annotations: Language rows of the frame (subtask, memory, ...), for policies with recipes.
        index: Position in the dataset: recipes and dropout draw from it, so that a sample is the same on every rank.
        timestamp_s: Of the frame in its episode: recipes resolve their rows at this time.
    """

    observation: Arrays
    task: str
    actions: npt.NDArray[np.float32] | None = None
    is_pad: npt.NDArray[np.bool_] | None = None
    annotations: Mapping[str, Any] | None = None
    index: int = 0
    timestamp_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CommittedPrefix:
    """Real-time chunking, per row: what is still to be executed of the previous chunk.

    Attributes:
        actions: (B, H, A) float32, what Policy.carried() made of the previous chunk, from the present step on; zero beyond
            length.
        length: (B,) int64, 0 where a row has no previous chunk.
        delay_steps: (B,) int64, actions that will have been executed when this chunk arrives.
        execution_horizon: (B,) int64, steps from now over which the guidance fades out.
    """

    actions: torch.Tensor
    length: torch.Tensor
    delay_steps: torch.Tensor
    execution_horizon: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Per-sample values of each named term, (B,) float32, and the weighted sum to minimise, a scalar."""

    total: torch.Tensor
    terms: Mapping[str, torch.Tensor]


class TextKind(enum.Enum):
    SUBTASK = "subtask"
    MEMORY = "memory"
    INTERJECTION = "interjection"
    VISUAL_QUESTION = "visual_question"


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What the text head is asked. InvalidInput names a field that cannot be.

    Attributes:
        kind: Which prompt.
        user_text: The interjection or question; for MEMORY the subtask that was just completed.
        previous_text: The last subtask, memory or plan.
        max_new_tokens: 0 is the policy's default.
        min_new_tokens: No end of text before so many.
        temperature: 0 is greedy, else 0.01 to 100: below, a quotient of logits overflows.
        top_p: Nucleus of that mass, up to 1; 0 is off.
        seed: Of the draws when temperature > 0, 64 bits; the same request gives the same text.
    """

    kind: TextKind
    user_text: str = ""
    previous_text: str = ""
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, TextKind):
            raise InvalidInput(f"is {self.kind!r}, must be one of {', '.join(map(str, TextKind))}", field="kind")
        for name in ("max_new_tokens", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"is {getattr(self, name)}, must be at least 0", field=name)
        if self.max_new_tokens and self.min_new_tokens > self.max_new_tokens:
            raise InvalidInput(
                f"is {self.min_new_tokens}, over max_new_tokens ({self.max_new_tokens})", field="min_new_tokens"
            )
        if self.temperature != 0.0 and not 0.01 <= self.temperature <= 100.0:
            raise InvalidInput(
                f"is {self.temperature:g}, must be 0 for the likeliest text, or 0.01 to 100", field="temperature"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise InvalidInput(f"is {self.top_p:g}, must be 0 to 1; 0 and 1 take every token", field="top_p")
        if not 0 <= self.seed < 1 << 64:
            raise InvalidInput(f"is {self.seed}, must be 0 to 2**64 - 1", field="seed")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that train at learning rate * lr_scale."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0


class Policy(nn.Module, abc.ABC, Generic[InputsT]):
    """A model with its processors. Subclasses are listed in policies/registry.py and found by name only there.

    InputsT is a frozen dataclass of tensors with B first (None where a sample has no such part), so that callers can pick
    and join rows without knowing more (policies/rows.py). How each planned policy maps onto this class:
    docs/design/0010-policy-interface.md.

    Attributes:
        type_name: Name in the registry and in checkpoints.
        spec: The observation and action features the weights were trained on, in the robot's units.
        horizon: Actions in a chunk, H.
        model_action_size: A; at least the robot's R, the rest is padding.
        has_text_head: generate() works.
        masks_missing_cameras: preprocess() takes samples that lack some of the spec's cameras.
        files: What take_files() took; a checkpoint keeps them.
    """

    type_name: ClassVar[str]
    has_text_head: ClassVar[bool] = False
    masks_missing_cameras: ClassVar[bool] = False
    spec: Spec
    horizon: int
    model_action_size: int
    files: Files = types.MappingProxyType({})

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> Policy[InputsT]:
        """Builds the module with fresh weights; unknown keys, wrong types and impossible values are InvalidInput."""

    def take_files(self, files: Files) -> None:
        """The tokenizers and the recipe of a checkpoint; most policies need none.

        Raises:
            NotFound: One that the configuration names is not there.
            Corrupt, InvalidInput: One that is not what its name says.
        """

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        """A configuration that builds in a moment, for tests of what all policies promise."""
        return {}

    @abc.abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """JSON-able; from_config(config_dict(), spec) builds the same module."""

    @abc.abstractmethod
    def set_statistics(self, statistics: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]) -> None:
        """Takes {feature: {mean, std, q01, ...}} of the training data. Statistics are part of the state dict."""

    def relative_action_mask(self) -> npt.NDArray[np.bool_] | None:
        """(R,) True where the model sees action minus state: action statistics are then of those differences."""
        return None

    def parameter_groups(self) -> list[ParameterGroup]:
        """What trains, in groups with their own learning rates."""
        return [ParameterGroup(name="all", parameters=[p for p in self.parameters() if p.requires_grad])]

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that FSDP gathers one at a time, in order of use, usually the layers; empty for a small policy."""
        return ()

    @abc.abstractmethod
    def preprocess(self, samples: Sequence[Sample], device: torch.device) -> InputsT:
        """B samples to model inputs on device. InvalidInput names the feature that does not fit."""

    @abc.abstractmethod
    def loss(self, inputs: InputsT, generator: torch.Generator) -> Losses:
        """The training objective; inputs must come from samples with actions.

        Noise and times are drawn from generator, a CPU generator, so that a run is the same on every device.
        """

    def forward(self, inputs: InputsT, generator: torch.Generator) -> Losses:
        """loss(), where the hooks of DDP and FSDP see it."""
        return self.loss(inputs, generator)

    @abc.abstractmethod
    def act(
        self, inputs: InputsT, noise: torch.Tensor, committed: CommittedPrefix | None = None, num_steps: int | None = None
    ) -> torch.Tensor:
        """(B, H, A) float32 chunk in model space. A row depends on its own inputs, noise (B, H, A) and prefix only.

        num_steps: Euler steps; None is the policy's own number.
        """

    @abc.abstractmethod
    def postprocess(self, chunk: torch.Tensor, inputs: InputsT) -> npt.NDArray[np.float32]:
        """(B, H, A) model space to (B, H, R) in the robot's units."""

    def carried(self, chunk: torch.Tensor, inputs: InputsT) -> torch.Tensor:
        """(B, H, A) float32 that travels with a chunk and comes back as CommittedPrefix.actions.

        Model space as it is, unless model space depends on the observation: a policy with relative actions carries absolute
        ones and act() anchors them at the state of its own inputs, so that no server has to remember an old state.
        """
        return chunk

    def prefix_bytes(self) -> int:
        """What the model keeps on its device for each row of a pass, besides activations."""
        return 0

    def shown_prompts(self, sample: Sample) -> Mapping[str, str]:
        """The texts a language tower reads of a sample, by their use, for people; empty without such a tower.

        Where one cannot be made, what is missing for it stands in its place.
        """
        return {}

    def draw_noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """(B, H, A) float32 standard normal on the CPU, row b from seeds[b] alone."""
        rows = [
            torch.randn(1, self.horizon, self.model_action_size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def used_observations(self) -> frozenset[str]:
        """Names of the spec's observation features that preprocess() reads: what a robot has to send."""
        return frozenset(feature.name for feature in self.spec.observation)

    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        """Text from the language head, a piece per token."""
        raise NotOffered(f"policy type {self.type_name!r} has no text head", field="model")
