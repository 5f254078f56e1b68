"""What policies with prompts, cameras and an action expert share: samples to tensors and back, one row at a time.

Shapes: B rows, I cameras, L prompt tokens, T horizon, A action size of the model, R of the robot, S state.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Spec

from . import images, normalization, rows, text, vectors
from . import samples as sample_checks
from .configuration import TowerSize
from .files import Files
from .losses import Term
from .normalization import Normalization, Normalizer, Numbers, Statistics
from .policy import CommittedPrefix, Losses, Policy, Sample, TextKind, TextRequest
from .prompt import Pieces, Prompt, Prompter

PAD_TOKEN = 0
EMPTY_CAMERA = "observation.images.empty_camera_"


class PromptedInputs(Protocol):
    """The state, (B, S) float32 in the robot's units, is in all inputs: relative actions are anchored at it."""

    @property
    def state(self) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A sample's prompt, and its state (1, S) in the robot's units, on the CPU, which relative actions are anchored at."""

    prompt: Prompt
    state: torch.Tensor


class PromptedConfig(Protocol):
    """What the configurations have in common; their own docstrings say what each is."""

    @property
    def horizon(self) -> int: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def num_empty_cameras(self) -> int: ...
    @property
    def state_normalization(self) -> Normalization: ...
    @property
    def action_normalization(self) -> Normalization: ...
    @property
    def byte_prompts(self) -> bool: ...


class PromptedNetwork(text.TextNetwork[Any], Protocol):
    """The parts that both networks have under one name."""

    @property
    def config(self) -> Any: ...
    @property
    def vision(self) -> Any: ...
    @property
    def token_table(self) -> nn.Module: ...
    @property
    def language(self) -> Any: ...
    @property
    def text_head(self) -> nn.Linear: ...
    @property
    def expert(self) -> Any: ...


InputsT = TypeVar("InputsT", bound=PromptedInputs)
ConfigT = TypeVar("ConfigT", bound=PromptedConfig)


class PromptedPolicy(Policy[InputsT], Generic[InputsT, ConfigT]):
    """Policy's docstrings say what each method promises.

    Attributes:
        config: As parsed.
        prompter: Makes prompts; without one, preprocess() and generate() are not offered.
        cameras: Names in the order the model takes them, empty ones last.
        robot_action_size: R.
    """

    masks_missing_cameras = True
    network: PromptedNetwork

    def __init__(self, config: ConfigT, spec: Spec, prompter: Prompter | None, *, action_size: int) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.prompter = self._prompter_of({}) if prompter is None and config.byte_prompts else prompter
        self.horizon = config.horizon
        self.model_action_size = action_size
        self.robot_action_size = vectors.size(spec.action)
        if self.robot_action_size > self.model_action_size:
            raise InvalidInput(
                f"has {self.robot_action_size} numbers, the model holds {self.model_action_size}", field="spec.action"
            )
        self.cameras = (*(f.name for f in spec.images), *(f"{EMPTY_CAMERA}{i}" for i in range(config.num_empty_cameras)))
        if not spec.images:
            raise InvalidInput("has no camera; this policy needs at least one", field="spec.observation")
        self._state_features = spec.states
        self.state_normalizer = Normalizer(config.state_normalization, vectors.size(spec.states))
        self.action_normalizer = Normalizer(config.action_normalization, self.robot_action_size)

    def take_files(self, files: Files) -> None:
        prompter = self._prompter_of(files)
        if prompter is not None:
            vocabulary = self.network.config.vocabulary
            if prompter.num_ids > vocabulary:  # On a GPU such a token would end the process.
                raise InvalidInput(
                    f"has ids up to {prompter.num_ids - 1}, the network's table ends at {vocabulary - 1}; "
                    "this is another model's tokenizer",
                    field="tokenizer",
                )
            self.prompter, self.files = prompter, dict(files)

    @abc.abstractmethod
    def _prompter_of(self, files: Files) -> Prompter | None:
        """As the configuration says; None where files do not suffice."""

    def shard_units(self) -> Sequence[nn.Module]:
        network = self.network
        return (
            *network.vision.layers,
            network.token_table,
            *network.language.layers,
            network.text_head,
            *network.expert.layers,
        )

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        self.state_normalizer.set(vectors.join_statistics(statistics, self.spec.states), field="observation")
        self.action_normalizer.set(vectors.join_statistics(statistics, self.spec.action), field="action")

    # -- samples to tensors --------------------------------------------------------------------------------------------

    def preprocess(self, samples: Sequence[Sample], device: torch.device) -> InputsT:
        sample_checks.check(samples, self.spec)
        numbers = sample_checks.states(samples, self._state_features)
        state = torch.from_numpy(numbers).to(self._statistics_device())
        actions = self._actions(samples, state)
        prompts = self._prompts(samples, numbers, actions)
        return self._inputs(samples, prompts, state, actions, self.config.prompt_length, device)

    @abc.abstractmethod
    def _inputs(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Prompt],
        state: torch.Tensor,
        actions: torch.Tensor | None,
        length: int,
        device: torch.device,
    ) -> InputsT:
        """state in the robot's units, actions normalised; prompts are padded to length tokens."""

    def _pictures(
        self, samples: Sequence[Sample], height: int, width: int, padding: images.Padding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, I, 3, height, width) and (B, I) bool.

        Every camera at its own place, rows apart: attention masks what is missing and gives it no position.
        """
        shape = (len(samples), len(self.cameras), 3, height, width)
        pictures = torch.full(shape, images.MISSING_VALUE)
        valid = torch.zeros(shape[:2], dtype=torch.bool)
        for row, sample in enumerate(samples):
            for column, name in enumerate(self.cameras):
                if name in sample.observation:
                    floats = images.to_unit_range(sample.observation[name], field=name)
                    pictures[row, column] = images.prepare(floats, height, width, padding=padding, field=name)[0]
                    valid[row, column] = True
            if not valid[row].any():
                cameras = ", ".join(feature.name for feature in self.spec.images)
                raise InvalidInput(f"lacks every camera; one of {cameras} is needed", field="observation")
        return pictures, valid

    def _actions(self, samples: Sequence[Sample], state: torch.Tensor) -> torch.Tensor | None:
        """(B, T, R) normalised, finite."""
        actions = sample_checks.actions(samples, self.horizon, self.robot_action_size)
        if actions is None:
            return None
        normalised = self._to_model_space(torch.from_numpy(actions).to(state.device), state)
        for column, name in enumerate(vectors.element_names(self.spec.action)):
            if not normalised[:, :, column].isfinite().all():
                value = float(np.abs(actions[:, :, column]).max())
                raise InvalidInput(f"reaches {value:.4g}, so far from its statistics that it overflows float32", field=name)
        return normalised

    def _prompts(
        self, samples: Sequence[Sample], numbers: npt.NDArray[np.float32], actions: torch.Tensor | None
    ) -> list[Prompt]:
        """For training where there are actions, else for acting. numbers (B, S) in the robot's units, actions normalised."""
        prompter = self._prompter()
        normalised = self._normalised(numbers)
        if actions is None:
            return [prompter.acting(sample, row) for sample, row in zip(samples, normalised, strict=True)]
        targets = actions.cpu().numpy()
        return [
            prompter.training(sample, row, target) for sample, row, target in zip(samples, normalised, targets, strict=True)
        ]

    # -- training ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def loss_weights(self) -> dict[str, float]:
        """By term: how much of each is in the total."""

    def _weighted(self, terms: Mapping[str, Term]) -> Losses:
        weights = self.loss_weights()
        total = torch.stack([weights[name] * term.mean for name, term in terms.items()]).sum()
        return Losses(total=total, terms={name: term.per_sample for name, term in terms.items()})

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        inputs: InputsT,
        noise: torch.Tensor,
        committed: CommittedPrefix | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        expected = (rows.count(inputs), self.horizon, self.model_action_size)
        for name, given in (
            ("noise", noise),
            *((("committed.actions", committed.actions),) if committed is not None else ()),
        ):
            if tuple(given.shape) != expected:
                raise InvalidInput(f"is {tuple(given.shape)}, must be {expected}: rows, horizon, action size", field=name)
        if num_steps is not None and num_steps < 1:
            raise InvalidInput(f"is {num_steps}, must be at least 1; None is the policy's own number", field="num_steps")
        # Row by row: a matrix kernel chosen for another batch size adds in another order, and a robot's chunk must be the
        # same bits whoever else is served. A server that batches takes the network's steps itself, and says how near it is.
        chunks = []
        for row in range(noise.shape[0]):
            at = slice(row, row + 1)
            one = rows.select(inputs, at)
            prefix = None
            if committed is not None and int(committed.length[row]):
                prefix = self.anchored(rows.select(committed, at), one)
            chunks.append(self._act_one(one, noise[at], prefix, num_steps))
        return torch.cat(chunks)

    @abc.abstractmethod
    def _act_one(
        self, inputs: InputsT, noise: torch.Tensor, committed: CommittedPrefix | None, num_steps: int | None
    ) -> torch.Tensor:
        """act() for one row; committed is anchored."""

    def anchored(self, committed: CommittedPrefix, inputs: InputsT) -> CommittedPrefix:
        """What carried() gave, in the model space of inputs; zero beyond the robot's numbers, anything beyond its length."""
        return dataclasses.replace(committed, actions=self.anchored_actions(committed.actions, inputs.state))

    def anchored_actions(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """anchored() of the actions alone: (B, steps, A), at state (B, S) in the robot's units."""
        actions = actions[..., : self.robot_action_size]
        if self.relative_action_mask() is not None:
            actions = self._to_model_space(actions, state)
        return self._pad_actions(actions)

    @torch.no_grad()
    def postprocess(self, chunk: torch.Tensor, inputs: InputsT) -> npt.NDArray[np.float32]:
        actions: npt.NDArray[np.float32] = self.finished(chunk, inputs.state)[0].float().cpu().numpy()
        return actions

    def carried(self, chunk: torch.Tensor, inputs: InputsT) -> torch.Tensor:
        return self.finished(chunk, inputs.state)[1]

    def finished(self, chunk: Numbers, state: Numbers) -> tuple[Numbers, Numbers]:
        """postprocess() and carried() of chunks (B, T, A) at states (B, S): (B, T, R) and (B, T, A).

        The same bits of either kind.
        """
        made = chunk[..., : self.robot_action_size]
        actions = self.action_normalizer.unnormalize(made)
        mask = self.relative_action_mask()
        if mask is None:
            return actions, self._pad_actions(made)
        actions = normalization.to_absolute(actions, *self._relative(mask, state))
        return actions, self._pad_actions(actions)

    def _to_model_space(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(B, T, R) in the robot's units to normalised."""
        mask = self.relative_action_mask()
        if mask is not None:
            actions = normalization.to_relative(actions, *self._relative(mask, state))
        return self.action_normalizer.normalize(actions)

    def _relative(self, mask: npt.NDArray[np.bool_], state: Numbers) -> tuple[Numbers, Any]:
        """State (B, R) and mask (R,), both as state is: numbers of the state that no action stands for are left out."""
        size = self.robot_action_size
        fitting = _padded_to(state[:, :size], size)
        return fitting, torch.from_numpy(mask).to(fitting.device) if isinstance(fitting, torch.Tensor) else mask

    def _pad_actions(self, actions: Numbers) -> Numbers:
        return _padded_to(actions, self.model_action_size)

    # -- text ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        if not self.has_text_head:
            raise NotOffered(f"policy type {self.type_name!r} has no text head", field="model")
        if len(samples) != 1:
            raise InvalidInput(f"text is generated for one sample at a time, not {len(samples)}", field="samples")
        question = self.question(samples[0], request)
        inputs = self._inputs(samples, [question.prompt], question.state, None, len(question.prompt.tokens), device)
        generators = [torch.Generator().manual_seed(request.seed)]
        pieces = Pieces(self._prompter())
        for token in text.generate(self.network, self.text_state(inputs), self.decoding(request), generators):
            piece = pieces.add(int(token))
            if piece is not None:
                yield piece

    def question(self, sample: Sample, request: TextRequest) -> Read:
        """What the text head reads, before it is padded."""
        sample_checks.check([sample], self.spec)
        sample_checks.check_text(request.user_text, "user_text")
        sample_checks.check_text(request.previous_text, "previous_text")
        numbers = sample_checks.states([sample], self._state_features)
        prompt = self._prompter().asking(sample, request, self._normalised(numbers)[0])
        return Read(prompt=prompt, state=torch.from_numpy(numbers))

    def observation(self, sample: Sample) -> Read:
        """What an action chunk is made from, before it is padded."""
        sample_checks.check([sample], self.spec)
        numbers = sample_checks.states([sample], self._state_features)
        (prompt,) = self._prompts([sample], numbers, None)
        return Read(prompt=prompt, state=torch.from_numpy(numbers))

    @abc.abstractmethod
    def text_state(self, inputs: InputsT) -> Any:
        """The prefix that text follows, with hidden states; as the network's text_step takes it."""

    def decoding(self, request: TextRequest) -> text.Decoding:
        """Which tokens may come, and when a text ends."""
        prompter = self._prompter()
        max_new_tokens = request.max_new_tokens or self.config.max_new_tokens
        if request.min_new_tokens > max_new_tokens:
            raise InvalidInput(
                f"is {request.min_new_tokens}, over this policy's max_new_tokens ({max_new_tokens}); give both",
                field="min_new_tokens",
            )
        return text.Decoding(
            max_new_tokens=max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            end_token=prompter.eos_token,
            special_tokens=prompter.special_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
        )

    # -- for people ----------------------------------------------------------------------------------------------------

    def prefix_bytes(self) -> int:
        size: TowerSize = self.network.config.language
        weight = self.network.text_head.weight
        return 2 * size.depth * size.kv_heads * size.head_dim * self._prefix_length() * weight.element_size()

    @abc.abstractmethod
    def _prefix_length(self) -> int:
        """Tokens of pictures, prompt and state."""

    def shown_prompts(self, sample: Sample) -> Mapping[str, str]:
        """acting; subtask, where there is a text head; training, where the sample has actions."""
        prompter = self._prompter()
        sample_checks.check([sample], self.spec)
        numbers = sample_checks.states([sample], self._state_features)
        state = torch.from_numpy(numbers).to(self._statistics_device())
        normalised = self._normalised(numbers)[0]
        made: dict[str, Callable[[], Prompt]] = {"acting": lambda: prompter.acting(sample, normalised)}
        if self.has_text_head:
            made["subtask"] = lambda: prompter.asking(sample, TextRequest(kind=TextKind.SUBTASK), normalised)
        if sample.actions is not None:
            made["training"] = lambda: self._prompts([sample], numbers, self._actions([sample], state))[0]
        shown = {}
        for use, make in made.items():
            try:
                shown[use] = prompter.shown(make())
            except (InvalidInput, NotOffered) as reason:
                shown[use] = f"none: {reason}"
        return shown

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _normalised(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """States (B, S) for prompts, finite. On the CPU wherever the policy is: the same bins everywhere."""
        normalised = self.state_normalizer.normalize(numbers)
        finite = np.isfinite(normalised)
        if not finite.all():
            column = int(finite.all(axis=0).argmin())
            value = float(np.abs(numbers[:, column]).max())
            name = vectors.element_names(self._state_features)[column]
            raise InvalidInput(f"reaches {value:.4g}, so far from its statistics that it overflows float32", field=name)
        return normalised

    def _check_lengths(self, prompts: Sequence[Prompt], length: int) -> None:
        for prompt in prompts:
            if len(prompt.tokens) > length:
                raise InvalidInput(f"has {len(prompt.tokens)} tokens, prompt_length is {length}", field="task")

    def _prompter(self) -> Prompter:
        if self.prompter is None:
            raise NotOffered(
                "this policy was built without a tokenizer and acts on prepared inputs only; put tokenizer/tokenizer.json "
                "into its checkpoint, or make it again with --files or --tokenizer",
                field="prompter",
            )
        return self.prompter

    def _statistics_device(self) -> torch.device:
        for normalizer in (self.state_normalizer, self.action_normalizer):
            if normalizer.normalization is not Normalization.IDENTITY:
                return normalizer.first.device
        return next(iter(self.buffers()), torch.empty(0)).device


def padded(values: Sequence[npt.NDArray[Any] | None], width: int, filler: int) -> torch.Tensor:
    """(B, width) int64: rows of different length, padded on the right; one that is None is all filler."""
    out = torch.full((len(values), width), filler, dtype=torch.int64)
    for index, row in enumerate(values):
        if row is not None:
            out[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out


def ones_like(values: Sequence[npt.NDArray[Any] | None]) -> list[npt.NDArray[Any] | None]:
    """For padded(): which positions are there."""
    return [None if row is None else np.ones_like(row) for row in values]


def _padded_to(numbers: Numbers, size: int) -> Numbers:
    """(..., less) to (..., size) with zeros."""
    missing = size - numbers.shape[-1]
    if isinstance(numbers, torch.Tensor):
        return functional.pad(numbers, (0, missing))
    return np.concatenate([numbers, np.zeros((*numbers.shape[:-1], missing), dtype=numbers.dtype)], axis=-1)
