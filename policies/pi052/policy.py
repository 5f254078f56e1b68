"""pi052 and pi05 behind the Policy interface.

Shapes: B rows, I cameras, L prompt tokens, F FAST tokens, T horizon, A action size of the model, R of the robot, S state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from manyhands.errors import InvalidInput, NotOffered
from manyhands.spec import Spec

from .. import images, losses, normalization, rows, text, vectors
from ..byte_prompts import BytePrompter
from ..normalization import Normalizer, Statistics
from ..policy import CommittedPrefix, Losses, ParameterGroup, Policy, Sample, TextKind, TextRequest
from ..prompt import Prompt, Prompter
from . import config as configs
from . import flow, sampling
from .config import ChunkMode, Pi052Config
from .gemma import GemmaLayer
from .model import Pi052Network, PrefixState

PAD_TOKEN = 0
EMPTY_CAMERA = "observation.images.empty_camera_"


@dataclass(frozen=True, kw_only=True)
class Pi052Inputs:
    """Attributes:
    pictures: (B, I, 3, height, width) float32 in [-1, 1].
    picture_valid: (B, I) bool, False for a camera the row lacks.
    state: (B, S) float32 in the robot's units; the network sees it only as text.
    tokens, token_valid: (B, L) int64 and bool, padded on the right.
    token_marks: (B, L) bool, causal text that is given; None: none.
    labels: (B, L) int64; None when acting or asking.
    predicts: (B,) bool; None: all do.
    fast_tokens, fast_valid, fast_is_code: (B, F); None where FAST does not train.
    actions: (B, T, A) float32, normalised and zero beyond R; None when acting.
    """

    pictures: torch.Tensor
    picture_valid: torch.Tensor
    state: torch.Tensor
    tokens: torch.Tensor
    token_valid: torch.Tensor
    token_marks: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    predicts: torch.Tensor | None = None
    fast_tokens: torch.Tensor | None = None
    fast_valid: torch.Tensor | None = None
    fast_is_code: torch.Tensor | None = None
    actions: torch.Tensor | None = None


class Pi052Policy(Policy[Pi052Inputs]):
    """Policy's docstrings say what each method promises.

    Attributes:
        network: The model; a server calls its steps one by one.
        prompter: Makes prompts; without one, preprocess() and generate() are not offered.
    """

    type_name: ClassVar[str] = "pi052"
    has_text_head: ClassVar[bool] = True
    masks_missing_cameras: ClassVar[bool] = True

    def __init__(self, config: Pi052Config, spec: Spec, prompter: Prompter | None = None) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        if prompter is None and config.byte_prompts:
            prompter = BytePrompter(config.prompt_length, with_text=config.text_weight > 0)
        self.prompter = prompter
        self.horizon = config.horizon
        self.model_action_size = config.network.action_size
        self.robot_action_size = vectors.size(spec.action)
        if self.robot_action_size > self.model_action_size:
            raise InvalidInput(
                f"has {self.robot_action_size} numbers, the model holds {self.model_action_size}", field="spec.action"
            )
        self.cameras = (*(f.name for f in spec.images), *(f"{EMPTY_CAMERA}{i}" for i in range(config.num_empty_cameras)))
        if not spec.images:
            raise InvalidInput("has no camera; this policy needs at least one", field="spec.observation")
        self.state_normalizer = Normalizer(config.state_normalization, vectors.size(spec.states))
        self.action_normalizer = Normalizer(config.action_normalization, self.robot_action_size)
        self.network = Pi052Network(config.network)
        for parameter in self._frozen():
            parameter.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> Pi052Policy:
        return cls(configs.parse(config), spec)

    def config_dict(self) -> dict[str, Any]:
        return configs.dump(self.config)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        return configs.dump(configs.TINY)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        self.state_normalizer.set(vectors.join_statistics(statistics, self.spec.states), field="observation")
        self.action_normalizer.set(vectors.join_statistics(statistics, self.spec.action), field="action")

    def relative_action_mask(self) -> npt.NDArray[np.bool_] | None:
        if not self.config.relative_actions:
            return None
        excluded = [part.lower() for part in self.config.relative_exclude]
        names = vectors.element_names(self.spec.action)
        relative = np.array([not any(part in name.lower() for part in excluded) for name in names], dtype=np.bool_)
        relative[vectors.size(self.spec.states) :] = False
        return relative

    def parameter_groups(self) -> list[ParameterGroup]:
        network, config = self.network, self.config
        head = [*network.text_head.parameters(), *network.token_table.parameters()]
        backbone = [p for part in (network.vision, network.projector, network.language) for p in part.parameters()]
        placed = {id(p) for p in head + backbone}
        groups = (
            ("backbone", backbone, config.backbone_lr_scale),
            ("action_expert", [p for p in network.parameters() if id(p) not in placed], config.expert_lr_scale),
            ("lm_head", head, config.head_lr_scale),
        )
        return [
            ParameterGroup(name=name, parameters=[p for p in parameters if p.requires_grad], lr_scale=scale)
            for name, parameters, scale in groups
            if any(p.requires_grad for p in parameters)
        ]

    def shard_units(self) -> Sequence[nn.Module]:
        network = self.network
        return (
            *network.vision.layers,
            network.token_table,
            *network.language.layers,
            network.text_head,
            *network.expert.layers,
        )

    # -- samples to inputs ---------------------------------------------------------------------------------------------

    def preprocess(self, samples: Sequence[Sample], device: torch.device) -> Pi052Inputs:
        state = self._state(samples)
        normalised = self.state_normalizer.normalize(state).cpu().numpy()
        actions = self._actions(samples, state)
        prompter = self._prompter()
        if actions is None:
            prompts = [prompter.acting(sample, row) for sample, row in zip(samples, normalised, strict=True)]
        else:
            targets = actions.cpu().numpy()
            prompts = [
                prompter.training(sample, row, target)
                for sample, row, target in zip(samples, normalised, targets, strict=True)
            ]
        return self._inputs(samples, prompts, state, actions, self.config.prompt_length, device)

    def _inputs(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Prompt],
        state: torch.Tensor,
        actions: torch.Tensor | None,
        length: int,
        device: torch.device,
    ) -> Pi052Inputs:
        """Prompts are padded to length tokens."""
        pictures, picture_valid = self._pictures(samples)
        for prompt in prompts:
            if len(prompt.tokens) > length:
                raise InvalidInput(f"has {len(prompt.tokens)} tokens, prompt_length is {length}", field="task")
        # In training by configuration, not by what these samples hold: see loss_terms().
        has_labels = actions is not None and self.config.text_weight > 0
        has_fast = actions is not None and self.config.fast_weight > 0
        has_marks = any(prompt.marks is not None for prompt in prompts)
        fast_length = max((len(p.fast_tokens) for p in prompts if p.fast_tokens is not None), default=1)

        def padded(values: Sequence[npt.NDArray[Any] | None], width: int, filler: int) -> torch.Tensor:
            out = torch.full((len(values), width), filler, dtype=torch.int64)
            for index, row in enumerate(values):
                if row is not None:
                    out[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
            return out

        def ones(values: Sequence[npt.NDArray[Any] | None]) -> list[npt.NDArray[Any] | None]:
            return [None if row is None else np.ones_like(row) for row in values]

        tokens = [prompt.tokens for prompt in prompts]
        fast = [prompt.fast_tokens for prompt in prompts]
        inputs = Pi052Inputs(
            pictures=pictures,
            picture_valid=picture_valid,
            state=state,
            tokens=padded(tokens, length, PAD_TOKEN),
            token_valid=padded(ones(tokens), length, 0).bool(),
            token_marks=padded([p.marks for p in prompts], length, 0).bool() if has_marks else None,
            labels=padded([p.labels for p in prompts], length, losses.IGNORED_LABEL) if has_labels else None,
            predicts=torch.tensor([p.predicts_actions for p in prompts]) if actions is not None else None,
            fast_tokens=padded(fast, fast_length, PAD_TOKEN) if has_fast else None,
            fast_valid=padded(ones(fast), fast_length, 0).bool() if has_fast else None,
            fast_is_code=padded([p.fast_is_code for p in prompts], fast_length, 0).bool() if has_fast else None,
            actions=None if actions is None else self._pad_actions(actions),
        )
        return rows.to_device(inputs, device)

    def _pictures(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Every camera at its own place, rows apart: attention masks what is missing and gives it no position."""
        network = self.config.network
        shape = (len(samples), len(self.cameras), 3, network.image_height, network.image_width)
        pictures = torch.full(shape, images.MISSING_VALUE)
        valid = torch.zeros(shape[:2], dtype=torch.bool)
        for row, sample in enumerate(samples):
            for column, name in enumerate(self.cameras):
                picture = sample.observation.get(name)
                if picture is not None:
                    floats = images.to_unit_range(picture, field=name)
                    pictures[row, column] = images.prepare(floats, network.image_height, network.image_width, field=name)[0]
                    valid[row, column] = True
            if not valid[row].any():
                raise InvalidInput(f"lacks every camera; one of {', '.join(self.cameras)} is needed", field="observation")
        return pictures, valid

    def _state(self, samples: Sequence[Sample]) -> torch.Tensor:
        rows = np.stack([vectors.concatenate(sample.observation, self.spec.states) for sample in samples])
        return torch.from_numpy(rows).to(self._statistics_device())

    def _actions(self, samples: Sequence[Sample], state: torch.Tensor) -> torch.Tensor | None:
        """(B, T, R) normalised."""
        given = [sample.actions for sample in samples if sample.actions is not None]
        if not given:
            return None
        expected = (self.horizon, self.robot_action_size)
        for actions in given:
            if actions.shape != expected or not np.isfinite(actions).all():
                raise InvalidInput(f"has shape {actions.shape}, must be {expected} of finite numbers", field="actions")
        if len(given) != len(samples):
            raise InvalidInput("some samples have actions and some have not", field="actions")
        return self._to_model_space(torch.from_numpy(np.stack(given).astype(np.float32)).to(state.device), state)

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, inputs: Pi052Inputs, generator: torch.Generator) -> Losses:
        config = self.config
        draws = flow.draw(
            config.flow_repeats * inputs.tokens.shape[0],
            config.horizon,
            self.model_action_size,
            config.trained_prefix_max_delay,
            generator,
        )
        return self.loss_of(inputs, draws.to(inputs.tokens.device))

    def loss_of(self, inputs: Pi052Inputs, draws: flow.Draws) -> Losses:
        """loss() with the draws given."""
        terms = self.loss_terms(inputs, draws)
        weights = self.loss_weights()
        total = torch.stack([weights[name] * term.mean for name, term in terms.items()]).sum()
        return Losses(total=total, terms={name: term.per_sample for name, term in terms.items()})

    def loss_terms(self, inputs: Pi052Inputs, draws: flow.Draws) -> dict[str, losses.Term]:
        """Those of flow, text and fast that the inputs and the configuration ask for.

        Which parts of the network run depends on which inputs there are and on the configuration, never on their values: all
        ranks of a training run the same, whatever their samples hold.
        """
        config, network = self.config, self.network
        has_flow = inputs.actions is not None and config.flow_weight > 0
        has_text = inputs.labels is not None and config.text_weight > 0
        has_fast = inputs.fast_tokens is not None and config.fast_weight > 0
        if not (has_flow or has_text or has_fast):
            raise InvalidInput("nothing to learn: neither actions nor labels with a loss weight > 0", field="inputs")
        predicts = inputs.predicts
        if predicts is None:
            predicts = torch.ones_like(inputs.tokens[:, 0], dtype=torch.bool)
        learns_language = has_text or has_fast or not config.knowledge_insulation
        with torch.set_grad_enabled(learns_language and torch.is_grad_enabled()):
            state = self.prefix_state(inputs, hidden=has_text or has_fast, fast=has_fast)

        terms: dict[str, losses.Term] = {}
        if has_flow:
            assert inputs.actions is not None
            seen = state.insulated() if config.knowledge_insulation else state
            errors, counted = flow.squared_errors(network, seen, inputs.actions, draws)
            terms["flow"] = losses.flow_term(errors, predicts, action_size=self.robot_action_size, counted=counted)
        if state.hidden is not None:
            text_targets = fast_targets = None
            num_fast = inputs.fast_tokens.shape[1] if has_fast and inputs.fast_tokens is not None else 0
            fast_begin = state.valid.shape[1] - num_fast
            if has_text and inputs.labels is not None:
                text_targets = (losses.text_targets(inputs.labels), fast_begin - inputs.labels.shape[1])
            if has_fast and inputs.fast_tokens is not None and inputs.fast_is_code is not None:
                fast_targets = (losses.fast_targets(inputs.fast_tokens, inputs.fast_is_code, predicts), fast_begin)
            of_text, of_fast = losses.token_terms(
                state.hidden, network.text_logits, text=text_targets, fast=fast_targets, z_weight=config.z_weight
            )
            terms |= {name: term for name, term in (("text", of_text), ("fast", of_fast)) if term is not None}
        return terms

    def loss_weights(self) -> dict[str, float]:
        """By term: how much of each is in the total."""
        return {"flow": self.config.flow_weight, "text": self.config.text_weight, "fast": self.config.fast_weight}

    def prefix_state(self, inputs: Pi052Inputs, *, hidden: bool, fast: bool = False) -> PrefixState:
        """Vision and language tower over the inputs; fast: their FAST tokens too."""
        marks = inputs.token_marks
        if inputs.labels is not None:
            marks = inputs.labels != losses.IGNORED_LABEL
        prefix = self.network.embed_prefix(
            self.network.encode_pictures(inputs.pictures),
            inputs.picture_valid,
            inputs.tokens,
            inputs.token_valid,
            token_marks=marks,
            fast_tokens=inputs.fast_tokens if fast else None,
            fast_valid=inputs.fast_valid if fast else None,
        )
        return self.network.run_prefix(prefix, hidden=hidden)

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        inputs: Pi052Inputs,
        noise: torch.Tensor,
        committed: CommittedPrefix | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        # Row by row: a matrix kernel chosen for another batch size adds in another order, and a robot's chunk must be the
        # same bits whoever else is served. A server that batches takes the network's steps itself, and says how near it is.
        chunks = []
        for row in range(noise.shape[0]):
            at = slice(row, row + 1)
            prefix = None if committed is None or not int(committed.length[row]) else rows.select(committed, at)
            chunks.append(self._act_one(rows.select(inputs, at), noise[at], prefix, num_steps or self.config.num_steps))
        return torch.cat(chunks)

    def _act_one(
        self, inputs: Pi052Inputs, noise: torch.Tensor, committed: CommittedPrefix | None, num_steps: int
    ) -> torch.Tensor:
        config = self.config
        velocity = sampling.velocity_of(self.network, self.prefix_state(inputs, hidden=False))
        if committed is not None:
            committed = self.anchored(committed, inputs)
            if config.chunk_mode is ChunkMode.TRAINED:
                max_delay = config.trained_prefix_max_delay
                return sampling.trained_chunk(velocity, noise, num_steps, committed=committed, max_delay=max_delay)
        return sampling.guided_chunk(
            velocity,
            noise,
            num_steps,
            committed=committed,
            schedule=config.prefix_schedule,
            max_guidance_weight=config.max_guidance_weight,
        )

    def anchored(self, committed: CommittedPrefix, inputs: Pi052Inputs) -> CommittedPrefix:
        """What carried() gave, in the model space of inputs; zero beyond the robot's numbers, anything beyond its length."""
        actions = committed.actions[..., : self.robot_action_size]
        if self.config.relative_actions:
            actions = self._to_model_space(actions, inputs.state)
        return dataclasses.replace(committed, actions=self._pad_actions(actions))

    @torch.no_grad()
    def postprocess(self, chunk: torch.Tensor, inputs: Pi052Inputs) -> npt.NDArray[np.float32]:
        actions: npt.NDArray[np.float32] = self._to_robot_space(chunk, inputs.state).float().cpu().numpy()
        return actions

    def carried(self, chunk: torch.Tensor, inputs: Pi052Inputs) -> torch.Tensor:
        if self.config.relative_actions:
            return self._pad_actions(self._to_robot_space(chunk, inputs.state))
        return self._pad_actions(chunk[..., : self.robot_action_size])

    def _to_model_space(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(B, T, R) in the robot's units to normalised."""
        mask = self.relative_action_mask()
        if mask is not None:
            actions = normalization.to_relative(actions, *self._relative(mask, state))
        return self.action_normalizer.normalize(actions)

    def _to_robot_space(self, chunk: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        actions = self.action_normalizer.unnormalize(chunk[..., : self.robot_action_size])
        mask = self.relative_action_mask()
        return actions if mask is None else normalization.to_absolute(actions, *self._relative(mask, state))

    def _relative(self, mask: npt.NDArray[np.bool_], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """State (B, R) and mask (R,): numbers of the state that no action stands for are left out."""
        size = self.robot_action_size
        return functional.pad(state, (0, max(0, size - state.shape[1])))[:, :size], torch.from_numpy(mask).to(state.device)

    def _pad_actions(self, actions: torch.Tensor) -> torch.Tensor:
        return functional.pad(actions, (0, self.model_action_size - actions.shape[-1]))

    # -- text ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        if not self.has_text_head:
            raise NotOffered(f"policy type {self.type_name!r} has no text head", field="model")
        if len(samples) != 1:
            raise InvalidInput(f"text is generated for one sample at a time, not {len(samples)}", field="samples")
        prompter = self._prompter()
        state = self._state(samples)
        normalised = self.state_normalizer.normalize(state).cpu().numpy()
        prompt = prompter.asking(samples[0], request, normalised[0])
        prefix = self.prefix_state(self._inputs(samples, [prompt], state, None, len(prompt.tokens), device), hidden=True)
        rules = text.Decoding(
            max_new_tokens=request.max_new_tokens or self.config.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            end_token=prompter.eos_token,
            special_tokens=prompter.special_tokens,
            suppress_locations=request.kind is not TextKind.VISUAL_QUESTION,
            fast_skip_tokens=self.config.fast_skip_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
        )
        generators = [torch.Generator().manual_seed(request.seed)]
        ids: list[int] = []
        written = ""
        for token in text.generate(self.network, prefix, rules, generators):
            ids.append(int(token))
            # A token may end inside a character; its text comes with the token that completes it.
            whole = prompter.text(ids)
            if whole.startswith(written) and not whole.endswith("\ufffd"):
                yield whole[len(written) :]
                written = whole

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _frozen(self) -> Iterator[nn.Parameter]:
        """What does not train, and what no loss of this configuration can reach: DDP waits for every other gradient."""
        network, config = self.network, self.config
        learns_text = config.text_weight > 0 or config.fast_weight > 0
        parts: list[nn.Module] = []
        if config.train_expert_only or (config.knowledge_insulation and not learns_text):
            parts += [network.vision, network.projector, network.token_table, network.language, network.text_head]
        if config.freeze_vision:
            parts.append(network.vision)
        if not learns_text:
            # Actions read the last layer's keys and values, and nothing behind them.
            last = network.language.layers[-1]
            assert isinstance(last, GemmaLayer)
            parts += [network.text_head, network.language.norm, last.q, last.o, last.norm_2, last.gate, last.up, last.down]
        for part in parts:
            yield from part.parameters()

    def _prompter(self) -> Prompter:
        if self.prompter is None:
            raise NotOffered("this policy was built without a tokenizer: it acts on prepared inputs only", field="prompter")
        return self.prompter

    def _statistics_device(self) -> torch.device:
        return next(iter(self.state_normalizer.buffers()), torch.empty(0)).device


class Pi05Policy(Pi052Policy):
    """The same network, trained on actions alone; its text head is not offered."""

    type_name: ClassVar[str] = "pi05"
    has_text_head: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> Pi05Policy:
        return cls(configs.parse(configs.dump(configs.pi05_config()) | dict(config)), spec)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        tiny = configs.TINY
        return configs.dump(
            configs.pi05_config(
                network=tiny.network,
                horizon=tiny.horizon,
                num_steps=tiny.num_steps,
                prompt_length=tiny.prompt_length,
                byte_prompts=True,
            )
        )
