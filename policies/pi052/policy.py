"""pi052 and pi05 behind the Policy interface.

Shapes: B rows, I cameras, L prompt tokens, F FAST tokens, T horizon, A action size of the model, R of the robot, S state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from .. import images, losses, normalization, rows, text, vectors
from ..byte_prompts import BytePrompter
from ..files import Files
from ..policy import CommittedPrefix, Losses, ParameterGroup, Sample, TextKind, TextRequest
from ..prompt import Prompt, Prompter
from ..prompted import PAD_TOKEN, PromptedPolicy, ones_like, padded
from ..prompts.settings import pi052_prompter
from . import config as configs
from . import flow, sampling
from .config import ChunkMode, Pi052Config
from .gemma import GemmaLayer
from .model import Pi052Network, Prefix, PrefixState


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


class Pi052Policy(PromptedPolicy[Pi052Inputs, Pi052Config]):
    """Attributes:
    network: The model; a server calls its steps one by one.
    """

    network: Pi052Network
    type_name: ClassVar[str] = "pi052"
    has_text_head: ClassVar[bool] = True

    def __init__(self, config: Pi052Config, spec: Spec, prompter: Prompter | None = None) -> None:
        super().__init__(config, spec, prompter, action_size=config.network.action_size)
        self.network = Pi052Network(config.network)
        for parameter in self._frozen():
            parameter.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> Pi052Policy:
        return cls(configs.parse(config), spec)

    def _prompter_of(self, files: Files) -> Prompter | None:
        config = self.config
        if config.byte_prompts:
            return BytePrompter(config.prompt_length, with_text=config.text_weight > 0)
        return pi052_prompter(
            files,
            config.prompts,
            prompt_length=config.prompt_length,
            fast_skip_tokens=config.fast_skip_tokens,
            with_text=self.has_text_head,
            with_fast=config.fast_weight > 0,
        )

    def config_dict(self) -> dict[str, Any]:
        return configs.dump(self.config)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        return configs.dump(configs.TINY)

    def relative_action_mask(self) -> npt.NDArray[np.bool_] | None:
        if not self.config.relative_actions:
            return None
        names = vectors.element_names(self.spec.action)
        relative = normalization.relative_mask(self.robot_action_size, names, self.config.relative_exclude)
        relative[vectors.size(self.spec.states) :] = False  # Without a number of the state to be relative to.
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

    # -- samples to inputs ---------------------------------------------------------------------------------------------

    def _inputs(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Prompt],
        state: torch.Tensor,
        actions: torch.Tensor | None,
        length: int,
        device: torch.device,
    ) -> Pi052Inputs:
        network = self.config.network
        pictures, picture_valid = self._pictures(samples, network.image_height, network.image_width, images.Padding.CENTRED)
        self._check_lengths(prompts, length)
        # In training by configuration, not by what these samples hold: see loss_terms().
        # Labels also with text_weight 0: what was a target attends causally, as it does when it is given in acting.
        has_labels = actions is not None and self.has_text_head
        has_fast = actions is not None and self.config.fast_weight > 0
        has_marks = any(prompt.marks is not None for prompt in prompts)
        fast_length = max((len(p.fast_tokens) for p in prompts if p.fast_tokens is not None), default=1)

        tokens = [prompt.tokens for prompt in prompts]
        fast = [prompt.fast_tokens for prompt in prompts]
        inputs = Pi052Inputs(
            pictures=pictures,
            picture_valid=picture_valid,
            state=state,
            tokens=padded(tokens, length, PAD_TOKEN),
            token_valid=padded(ones_like(tokens), length, 0).bool(),
            token_marks=padded([p.marks for p in prompts], length, 0).bool() if has_marks else None,
            labels=padded([p.labels for p in prompts], length, losses.IGNORED_LABEL) if has_labels else None,
            predicts=torch.tensor([p.predicts_actions for p in prompts]) if actions is not None else None,
            fast_tokens=padded(fast, fast_length, PAD_TOKEN) if has_fast else None,
            fast_valid=padded(ones_like(fast), fast_length, 0).bool() if has_fast else None,
            fast_is_code=padded([p.fast_is_code for p in prompts], fast_length, 0).bool() if has_fast else None,
            actions=None if actions is None else self._pad_actions(actions),
        )
        return rows.to_device(inputs, device)

    # -- the prefix ----------------------------------------------------------------------------------------------------

    def embed_prefix(self, inputs: Pi052Inputs, *, fast: bool) -> Prefix:
        """fast: With the FAST tokens."""
        marks = inputs.token_marks
        if inputs.labels is not None:
            marks = inputs.labels != losses.IGNORED_LABEL
        return self.network.embed_prefix(
            self.network.encode_pictures(inputs.pictures),
            inputs.picture_valid,
            inputs.tokens,
            inputs.token_valid,
            token_marks=marks,
            fast_tokens=inputs.fast_tokens if fast else None,
            fast_valid=inputs.fast_valid if fast else None,
        )

    def prefix_state(self, inputs: Pi052Inputs, *, hidden: bool, fast: bool = False) -> PrefixState:
        """Vision and language tower over the inputs."""
        return self.network.run_prefix(self.embed_prefix(inputs, fast=fast), hidden=hidden)

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
        return self._weighted(self.loss_terms(inputs, draws))

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
        return {"flow": self.config.flow_weight, "text": self.config.text_weight, "fast": self.config.fast_weight}

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_one(
        self, inputs: Pi052Inputs, noise: torch.Tensor, committed: CommittedPrefix | None, num_steps: int | None
    ) -> torch.Tensor:
        config = self.config
        num_steps = num_steps or config.num_steps
        velocity = sampling.velocity_of(self.network, self.prefix_state(inputs, hidden=False))
        if committed is not None and config.chunk_mode is ChunkMode.TRAINED:
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

    # -- text ----------------------------------------------------------------------------------------------------------

    def text_state(self, inputs: Pi052Inputs) -> PrefixState:
        return self.prefix_state(inputs, hidden=True)

    def decoding(self, request: TextRequest) -> text.Decoding:
        return replace(
            super().decoding(request),
            suppress_locations=request.kind is not TextKind.VISUAL_QUESTION,
            fast_skip_tokens=self.config.fast_skip_tokens,
        )

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _prefix_length(self) -> int:
        return len(self.cameras) * self.config.network.num_patches + self.config.prompt_length

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
