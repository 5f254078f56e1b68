"""SmolVLA2 and SmolVLA behind the Policy interface.

Shapes: B rows, I cameras, L prompt tokens, T horizon, A action size of the model, R of the robot, S state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from .. import flow_matching, images, losses, rows, vectors
from .. import samples as sample_checks
from ..byte_prompts import BytePrompter
from ..files import Files
from ..policy import CommittedPrefix, Losses, Sample
from ..prompt import Prompt, Prompter
from ..prompted import PAD_TOKEN, PromptedPolicy, ones_like, padded
from ..prompts.settings import smolvla_prompter
from . import config as configs
from .config import SmolVLA2Config
from .model import Prefix, PrefixState, SmolVLA2Network


@dataclass(frozen=True, kw_only=True)
class SmolVLA2Inputs:
    """Attributes:
    pictures: (B, I, 3, height, width) float32 in [-1, 1].
    picture_valid: (B, I) bool, False for a camera the row lacks.
    state: (B, S) float32 in the robot's units.
    tokens, token_valid: (B, L) int64 and bool, padded on the right.
    labels: (B, L) int64; None when acting or asking, and where no text trains.
    predicts: (B,) bool; None: all do.
    actions: (B, T, A) float32, normalised and zero beyond R; None when acting.
    is_pad: (B, T) bool, steps beyond the episode's end; None: none.
    """

    pictures: torch.Tensor
    picture_valid: torch.Tensor
    state: torch.Tensor
    tokens: torch.Tensor
    token_valid: torch.Tensor
    labels: torch.Tensor | None = None
    predicts: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    is_pad: torch.Tensor | None = None


class SmolVLA2Policy(PromptedPolicy[SmolVLA2Inputs, SmolVLA2Config]):
    """Attributes:
    network: The model; a server calls its steps one by one.
    """

    network: SmolVLA2Network
    type_name: ClassVar[str] = "smolvla2"
    has_text_head: ClassVar[bool] = True

    def __init__(self, config: SmolVLA2Config, spec: Spec, prompter: Prompter | None = None) -> None:
        super().__init__(config, spec, prompter, action_size=config.network.action_size)
        state_size = vectors.size(spec.states)
        if state_size > config.network.state_size:
            raise InvalidInput(
                f"has {state_size} numbers of state, the model holds {config.network.state_size}", field="spec.observation"
            )
        self.network = SmolVLA2Network(config.network)
        for parameter in self._frozen():
            parameter.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> SmolVLA2Policy:
        return cls(configs.parse(config), spec)

    def _prompter_of(self, files: Files) -> Prompter | None:
        config = self.config
        if config.byte_prompts:
            return BytePrompter(config.prompt_length, with_text=config.text_weight > 0, with_state=False)
        return smolvla_prompter(files, config.prompts, prompt_length=config.prompt_length, with_text=self.has_text_head)

    def config_dict(self) -> dict[str, Any]:
        return configs.dump(self.config)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        return configs.dump(configs.TINY)

    # -- samples to inputs ---------------------------------------------------------------------------------------------

    def _inputs(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Prompt],
        state: torch.Tensor,
        actions: torch.Tensor | None,
        length: int,
        device: torch.device,
    ) -> SmolVLA2Inputs:
        network = self.config.network
        pictures, picture_valid = self._pictures(samples, network.image_height, network.image_width, images.Padding.LEFT_TOP)
        self._check_lengths(prompts, length)
        # In training by configuration, not by what these samples hold: see loss_terms().
        has_labels = actions is not None and self.config.text_weight > 0
        tokens = [prompt.tokens for prompt in prompts]
        inputs = SmolVLA2Inputs(
            pictures=pictures,
            picture_valid=picture_valid,
            state=state,
            tokens=padded(tokens, length, PAD_TOKEN),
            token_valid=padded(ones_like(tokens), length, 0).bool(),
            labels=padded([p.labels for p in prompts], length, losses.IGNORED_LABEL) if has_labels else None,
            predicts=torch.tensor([p.predicts_actions for p in prompts]) if actions is not None else None,
            actions=None if actions is None else self._pad_actions(actions),
            is_pad=None if actions is None else torch.from_numpy(sample_checks.is_pad(samples, self.horizon)),
        )
        return rows.to_device(inputs, device)

    # -- the prefix ----------------------------------------------------------------------------------------------------

    def embed_prefix(self, inputs: SmolVLA2Inputs, state: torch.Tensor | None) -> Prefix:
        """state: (B, S) normalised; None for text, whose prefix ends with the language."""
        return self.network.embed_prefix(
            self.network.encode_pictures(inputs.pictures),
            inputs.picture_valid,
            inputs.tokens,
            inputs.token_valid,
            state,
            token_marks=None if inputs.labels is None else inputs.labels != losses.IGNORED_LABEL,
        )

    def action_state(self, inputs: SmolVLA2Inputs) -> PrefixState:
        """The prefix that actions follow."""
        prefix = self.embed_prefix(inputs, self.state_normalizer.normalize(inputs.state))
        return self.network.run_prefix(prefix, hidden=False)

    def text_state(self, inputs: SmolVLA2Inputs) -> PrefixState:
        """The robot's state is not in it."""
        return self.network.run_prefix(self.embed_prefix(inputs, None), hidden=True)

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, inputs: SmolVLA2Inputs, generator: torch.Generator) -> Losses:
        count = inputs.tokens.shape[0]
        noise = torch.randn(count, self.horizon, self.model_action_size, generator=generator)
        time = flow_matching.draw_times(count, generator)
        return self.loss_of(inputs, noise.to(inputs.tokens.device), time.to(inputs.tokens.device))

    def loss_of(self, inputs: SmolVLA2Inputs, noise: torch.Tensor, time: torch.Tensor) -> Losses:
        """loss() with what is drawn given: noise (B, T, A) and times (B,)."""
        return self._weighted(self.loss_terms(inputs, noise, time))

    def loss_terms(self, inputs: SmolVLA2Inputs, noise: torch.Tensor, time: torch.Tensor) -> dict[str, losses.Term]:
        """Those of flow and text that the inputs and the configuration ask for.

        Which parts of the network run depends on which inputs there are and on the configuration, never on their values: all
        ranks of a training run the same, whatever their samples hold.
        """
        config, network = self.config, self.network
        has_flow = inputs.actions is not None and config.flow_weight > 0
        has_text = inputs.labels is not None and config.text_weight > 0
        if not (has_flow or has_text):
            raise InvalidInput("nothing to learn: neither actions nor labels with a loss weight > 0", field="inputs")
        prefix = self.embed_prefix(inputs, self.state_normalizer.normalize(inputs.state))
        state = network.run_prefix(prefix, hidden=has_text)

        terms: dict[str, losses.Term] = {}
        if has_flow:
            terms["flow"] = self._flow_term(inputs, self.squared_errors(inputs, state, noise, time))
        if has_text:
            assert inputs.labels is not None
            assert state.hidden is not None
            targets = losses.text_targets(inputs.labels)
            term, _ = losses.token_terms(
                state.hidden, network.text_logits, text=(targets, prefix.language.start), fast=None, z_weight=0.0
            )
            assert term is not None
            terms["text"] = term
        return terms

    def loss_weights(self) -> dict[str, float]:
        return {"flow": self.config.flow_weight, "text": self.config.text_weight}

    def squared_errors(
        self, inputs: SmolVLA2Inputs, state: PrefixState, noise: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """(B, T, A), of the velocity."""
        assert inputs.actions is not None
        x, target = flow_matching.interpolate(inputs.actions, noise, time)
        return (target - self.network.expert_step(self.network.seen(state, project=False), x, time)).square()

    def _flow_term(self, inputs: SmolVLA2Inputs, errors: torch.Tensor) -> losses.Term:
        predicts, counted = inputs.predicts, None
        if predicts is None:
            predicts = torch.ones_like(inputs.tokens[:, 0], dtype=torch.bool)
        if inputs.is_pad is not None:
            if self.config.padded_steps_dilute:
                errors = errors.masked_fill(inputs.is_pad[:, :, None], 0.0)
            else:
                counted = ~inputs.is_pad[:, None]
        return losses.flow_term(errors[:, None], predicts, action_size=self.robot_action_size, counted=counted)

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_one(
        self, inputs: SmolVLA2Inputs, noise: torch.Tensor, committed: CommittedPrefix | None, num_steps: int | None
    ) -> torch.Tensor:
        seen = self.network.seen(self.action_state(inputs))
        return flow_matching.euler(
            lambda x, time: self.network.expert_step(seen, x, time),
            noise,
            num_steps or self.config.num_steps,
            committed=committed,
            schedule=self.config.prefix_schedule,
            max_guidance_weight=self.config.max_guidance_weight,
        )

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _prefix_length(self) -> int:
        network = self.config.network
        rows, columns = network.patches
        # Two special tokens before a picture and one behind it.
        picture = rows * columns // network.shuffle**2 + (3 if network.image_special_tokens else 0)
        return max(len(self.cameras) * picture + self.config.prompt_length + 1, network.prefix_length)

    def _frozen(self) -> Iterator[nn.Parameter]:
        """What does not train: lerobot's rules, which leave nothing that no loss of the configuration can reach."""
        network, config = self.network, self.config
        parts: list[nn.Module] = []
        if config.train_expert_only:
            parts += [network.vision, network.connector, network.token_table, network.language, network.text_head]
        if config.freeze_vision:
            parts.append(network.vision)
        if config.text_weight == 0:
            parts += [network.text_head, network.language.norm, network.language.layers[-1]]
        if not config.train_state:
            parts.append(network.state_in)
        for part in parts:
            yield from part.parameters()


class SmolVLAPolicy(SmolVLA2Policy):
    """The same network, trained on actions alone; its text head is not offered."""

    type_name: ClassVar[str] = "smolvla"
    has_text_head: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: Spec) -> SmolVLAPolicy:
        return cls(configs.parse(configs.dump(configs.smolvla_config()) | dict(config)), spec)

    @classmethod
    def tiny_config(cls) -> Mapping[str, Any]:
        tiny = configs.TINY
        return configs.dump(
            configs.smolvla_config(
                network=tiny.network,
                horizon=tiny.horizon,
                num_steps=tiny.num_steps,
                prompt_length=tiny.prompt_length,
                train_expert_only=False,
                freeze_vision=False,
                byte_prompts=True,
            )
        )
