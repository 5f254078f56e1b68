"""Tests of the tests, for SmolVLA: each likely mistake, made on purpose, must be seen by the check that is there for it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from policies import attention, flow_matching, images, losses, siglip
from policies.smolvla2 import connector, llama, masks
from policies.smolvla2 import model as smol_model
from policies.smolvla2.policy import SmolVLA2Policy

from . import mutations, smol
from .golden import Golden
from .mutations import Measured, Mistake, Patch


def _pictures(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_pictures(smolvla), smol.PICTURE_LIMIT


def _prefix(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_prefix(smol.build(smolvla), smolvla, "all."), smol.AIM


def _missing_camera(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_prefix(smol.build(smolvla), smolvla, "missing0."), smol.AIM


def _flow_tensor(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_flow_tensor(smol.build(smolvla), smolvla, "all"), smol.AIM


def _masked_camera(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_flow_tensor(smol.build(smolvla), smolvla, "masked0"), smol.AIM


def _suffix(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_suffix(smol.build(smolvla), smolvla), smol.AIM


def _chunks(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_chunks(smol.build(smolvla), smolvla, "all."), smol.AIM


def _guided(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_guided(smol.build(smolvla), smolvla), smol.AIM


def _masked_loss(smolvla: Golden, _: Golden) -> Measured:
    return smol.measure_losses(smol.build(smolvla), smolvla, "masked"), smol.LOSS_AIM


def _losses(*names: str) -> Callable[[Golden, Golden], Measured]:
    def measure(_: Golden, smolvla2: Golden) -> Measured:
        errors = smol.measure_losses(smol.build(smolvla2), smolvla2, "time0")
        return {name: errors[name] for name in names}, smol.LOSS_AIM

    return measure


def _gradients(_: Golden, smolvla2: Golden) -> Measured:
    return smol.measure_gradients(smol.build(smolvla2), smolvla2, "time0"), smol.GRADIENT_LIMIT


def _text(_: Golden, smolvla2: Golden) -> Measured:
    policy = smol.build(smolvla2)
    return mutations.first_wrong(
        lambda case: smol.generated_ids(policy, smolvla2, case) != case["ids"], smolvla2.meta["select"]
    )


# -- the mistakes ------------------------------------------------------------------------------------------------------


def _pad_centred(patch: Patch) -> None:
    real = images.prepare

    def prepare(picture: torch.Tensor, height: int, width: int, **arguments: Any) -> torch.Tensor:
        return real(picture, height, width, **(arguments | {"padding": images.Padding.CENTRED}))

    patch.setattr(images, "prepare", prepare)


def _vision_eps(patch: Patch) -> None:
    real = siglip.SiglipLayer.forward

    def forward(self: siglip.SiglipLayer, x: torch.Tensor) -> torch.Tensor:
        self.norm_1.eps = self.norm_2.eps = 1e-5
        return real(self, x)

    patch.setattr(siglip.SiglipLayer, "forward", forward)


def _patch_positions_shifted(patch: Patch) -> None:
    """What an older transformers computes in float32: every patch but the first takes its neighbour's place."""

    def forward(self: siglip.Siglip, pictures: torch.Tensor) -> torch.Tensor:
        places = (torch.arange(self.position.num_embeddings) - 1).clamp(min=0)
        x = self.patch(pictures).flatten(2).transpose(1, 2) + self.position(places)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.norm(x)
        return out

    patch.setattr(siglip.Siglip, "forward", forward)


def _channels_first_shuffle(patch: Patch) -> None:
    real = connector.shuffle_patches

    def shuffle(features: torch.Tensor, patches: tuple[int, int], side: int) -> torch.Tensor:
        cells = real(features, patches, side)
        return cells.unflatten(2, (side * side, -1)).transpose(2, 3).flatten(2)

    patch.setattr(connector, "shuffle_patches", shuffle)


def _columns_before_rows(patch: Patch) -> None:
    real = connector.shuffle_patches

    def shuffle(features: torch.Tensor, patches: tuple[int, int], side: int) -> torch.Tensor:
        cells = real(features, patches, side)
        return cells.unflatten(2, (side, side, -1)).transpose(2, 3).flatten(2)

    patch.setattr(connector, "shuffle_patches", shuffle)


def _pictures_not_scaled(patch: Patch) -> None:
    real = smol_model.SmolVLA2Network.encode_pictures

    def encode(self: smol_model.SmolVLA2Network, pictures: torch.Tensor) -> torch.Tensor:
        return real(self, pictures) / math.sqrt(self.config.language.width)

    patch.setattr(smol_model.SmolVLA2Network, "encode_pictures", encode)


def _text_not_scaled(patch: Patch) -> None:
    patch.setattr(smol_model.SmolVLA2Network, "embed_tokens", lambda self, tokens: self.token_table(tokens))


def _state_before_text(patch: Patch) -> None:
    real = smol_model.SmolVLA2Network.embed_prefix

    def embed(self: smol_model.SmolVLA2Network, *arguments: Any, **named: Any) -> smol_model.Prefix:
        prefix = real(self, *arguments, **named)
        begin, state, length = prefix.language.start, prefix.language.stop, prefix.valid.shape[1]
        order = torch.tensor([*range(begin), state, *range(begin, state), *range(state + 1, length)])
        return replace(
            prefix,
            embeddings=prefix.embeddings[:, order],
            valid=prefix.valid[:, order],
            marks=prefix.marks[:, order],
            language=slice(begin + 1, state + 1),
        )

    patch.setattr(smol_model.SmolVLA2Network, "embed_prefix", embed)


def _unmarked(patch: Patch, where: Callable[[smol_model.Prefix], slice]) -> None:
    """Tokens that open no block of attention, though they should."""
    real = smol_model.SmolVLA2Network.embed_prefix

    def embed(self: smol_model.SmolVLA2Network, *arguments: Any, **named: Any) -> smol_model.Prefix:
        prefix = real(self, *arguments, **named)
        marks = prefix.marks.clone()
        marks[:, where(prefix)] = False
        return replace(prefix, marks=marks)

    patch.setattr(smol_model.SmolVLA2Network, "embed_prefix", embed)


def _state_not_marked(patch: Patch) -> None:
    _unmarked(patch, lambda prefix: slice(prefix.language.stop, None))


def _state_forgotten(patch: Patch) -> None:
    real = smol_model.SmolVLA2Network.embed_prefix

    def embed(self: smol_model.SmolVLA2Network, *arguments: Any, **named: Any) -> smol_model.Prefix:
        *others, state = arguments
        return real(self, *others, None if state is None else torch.zeros_like(state), **named)

    patch.setattr(smol_model.SmolVLA2Network, "embed_prefix", embed)


def _rope_base_of_the_config(patch: Patch) -> None:
    patch.setattr(attention, "ROPE_BASE", 100_000.0)


def _rms_plus_one(patch: Patch) -> None:
    real = llama.RmsNorm.forward
    patch.setattr(llama.RmsNorm, "forward", lambda self, x: real(self, x) + real(self, x) / self.weight)


def _rms_eps(patch: Patch) -> None:
    real = llama.RmsNorm.forward

    def forward(self: llama.RmsNorm, x: torch.Tensor) -> torch.Tensor:
        self.eps = 1e-6
        return real(self, x)

    patch.setattr(llama.RmsNorm, "forward", forward)


def _gelu_for_silu(patch: Patch) -> None:
    patch.setattr(functional, "silu", functional.gelu)


def _actions_bidirectional(patch: Patch) -> None:
    def suffix_attention(valid: torch.Tensor, horizon: int) -> torch.Tensor:
        own = torch.ones(valid.shape[0], horizon, horizon, dtype=torch.bool)
        return torch.cat([masks.prefix_to_actions(valid, horizon), own], dim=2)

    patch.setattr(masks, "suffix_attention", suffix_attention)


def _cross_layers_made_self_attention(patch: Patch) -> None:
    """Own keys as well, of the same projections; possible where the widths happen to fit, so they are cut to fit."""

    def forward(
        self: llama.CrossLayer,
        x: torch.Tensor,
        cos_sin: llama.CosSin,
        bias: torch.Tensor,
        keys_values: llama.KeysValues,
        is_projected: bool,
    ) -> torch.Tensor:
        normed = self.norm_1(x)
        q = attention.rotate(self._heads(self.q(normed)), *cos_sin)
        own = normed[..., : self.k.in_features]
        before = keys_values if is_projected else self.project(keys_values)
        keys = torch.cat([before[0], attention.rotate(self._heads(self.k(own)), *cos_sin)], dim=2)
        values = torch.cat([before[1], self._heads(self.v(own))], dim=2)
        causal = torch.ones(x.shape[0], x.shape[1], x.shape[1], dtype=torch.bool).tril()
        allowed = torch.cat([bias, attention.bias(causal, bias.dtype)], dim=3)
        return self._after_attention(x, attention.attend(q, keys, values, allowed))

    patch.setattr(llama.CrossLayer, "forward", forward)


def _cross_keys_not_projected(patch: Patch) -> None:
    patch.setattr(llama.CrossLayer, "project", lambda self, keys_values: keys_values)


def _cross_positions_behind_the_prefix(patch: Patch) -> None:
    patch.setattr(masks, "cross_positions", masks.suffix_positions)


def _cross_keys_rotated_again(patch: Patch) -> None:
    real = llama.CrossLayer.project

    def project(self: llama.CrossLayer, keys_values: llama.KeysValues) -> llama.KeysValues:
        k, v = real(self, keys_values)
        positions = torch.arange(k.shape[2]).expand(k.shape[0], -1)
        return attention.rotate(k, *attention.rotation(positions, self.head_dim)), v

    patch.setattr(llama.CrossLayer, "project", project)


def _positions_count_padding(patch: Patch) -> None:
    def suffix_positions(valid: torch.Tensor, horizon: int) -> torch.Tensor:
        return (valid.shape[1] + torch.arange(horizon)).expand(valid.shape[0], -1)

    patch.setattr(masks, "suffix_positions", suffix_positions)


def _masked_camera_seen(patch: Patch) -> None:
    def valid(self: smol_model.SmolVLA2Network, picture_valid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ones(tokens.shape[:3], dtype=torch.bool).flatten(1)

    patch.setattr(smol_model.SmolVLA2Network, "_picture_token_valid", valid)


def _only_so_many_appended(patch: Patch, count: int) -> None:
    real = images.prepare_cameras

    def prepare(*arguments: Any, **named: Any) -> images.Pictures:
        return real(*arguments, **(named | {"max_missing": count}))

    patch.setattr(images, "prepare_cameras", prepare)


def _time_before_action(patch: Patch) -> None:
    real = smol_model.SmolVLA2Network.embed_actions

    def embed(self: smol_model.SmolVLA2Network, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        weight = self.action_time_in.weight
        swapped = torch.cat(weight.detach().chunk(2, dim=1)[::-1], dim=1)
        self.action_time_in.weight = torch.nn.Parameter(swapped)
        out = real(self, x, time)
        self.action_time_in.weight = weight
        return out

    patch.setattr(smol_model.SmolVLA2Network, "embed_actions", embed)


def _time_of_next_step(patch: Patch) -> None:
    real = smol_model.SmolVLA2Network.expert_step
    patch.setattr(smol_model.SmolVLA2Network, "expert_step", lambda self, seen, x, time: real(self, seen, x, time - 0.05))


def _padded_steps_counted(patch: Patch) -> None:
    real = losses.flow_term
    patch.setattr(losses, "flow_term", lambda *args, **named: real(*args, **(named | {"counted": None})))


def _padded_steps_divided_out(patch: Patch) -> None:
    real = SmolVLA2Policy._flow_term

    def flow_term(self: SmolVLA2Policy, inputs: Any, errors: torch.Tensor) -> losses.Term:
        patch.setattr(self, "config", replace(self.config, padded_steps_dilute=False))
        return real(self, inputs, errors)

    patch.setattr(SmolVLA2Policy, "_flow_term", flow_term)


def _targets_not_causal(patch: Patch) -> None:
    _unmarked(patch, lambda prefix: prefix.language)


def _targets_hidden_from_actions(patch: Patch) -> None:
    """Not seen, but counted."""
    real_embed, real_seen = smol_model.SmolVLA2Network.embed_prefix, masks.prefix_to_actions
    targets: list[torch.Tensor] = []

    def embed(self: smol_model.SmolVLA2Network, *arguments: Any, **named: Any) -> smol_model.Prefix:
        prefix = real_embed(self, *arguments, **named)
        marks = torch.zeros_like(prefix.marks)
        marks[:, prefix.language] = prefix.marks[:, prefix.language]
        targets[:] = [marks]
        return prefix

    patch.setattr(smol_model.SmolVLA2Network, "embed_prefix", embed)
    patch.setattr(masks, "prefix_to_actions", lambda valid, horizon: real_seen(valid & ~targets[0], horizon))


def _insulated(patch: Patch) -> None:
    """As pi052 does it; SmolVLA2 lets the flow loss train what the expert reads."""
    real = smol_model.SmolVLA2Network.seen

    def seen(self: smol_model.SmolVLA2Network, state: smol_model.PrefixState, **named: Any) -> smol_model.Seen:
        return real(self, replace(state, keys_values=[(k.detach(), v.detach()) for k, v in state.keys_values]), **named)

    patch.setattr(smol_model.SmolVLA2Network, "seen", seen)


def _state_in_the_text_prefix(patch: Patch) -> None:
    def text_state(self: SmolVLA2Policy, inputs: Any) -> smol_model.PrefixState:
        return self.network.run_prefix(self.embed_prefix(inputs, inputs.state), hidden=True)

    patch.setattr(SmolVLA2Policy, "text_state", text_state)


def _text_position_repeated(patch: Patch) -> None:
    real = llama.LlamaTower.forward

    def forward(self: llama.LlamaTower, x: torch.Tensor, positions: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return real(self, x, positions - int(named.get("past") is not None), *rest, **named)

    patch.setattr(llama.LlamaTower, "forward", forward)


def _noise_and_actions_swapped(patch: Patch) -> None:
    real = flow_matching.interpolate
    patch.setattr(flow_matching, "interpolate", lambda actions, noise, time: real(noise, actions, time))


MISTAKES = [
    Mistake(name="padding centred", make=_pad_centred, found=_pictures),
    Mistake(name="exact GELU", make=mutations.exact_gelu, found=_prefix),
    Mistake(name="vision epsilon", make=_vision_eps, found=_prefix),
    Mistake(name="patch positions shifted", make=_patch_positions_shifted, found=_prefix),
    Mistake(name="shuffle with channels first", make=_channels_first_shuffle, found=_prefix),
    Mistake(name="shuffle by columns", make=_columns_before_rows, found=_prefix),
    Mistake(name="pictures not scaled", make=_pictures_not_scaled, found=_prefix),
    Mistake(name="text not scaled", make=_text_not_scaled, found=_prefix),
    Mistake(name="state before text", make=_state_before_text, found=_prefix),
    Mistake(name="state before text, seen in the flow", make=_state_before_text, found=_flow_tensor),
    Mistake(name="state seen by the prompt", make=_state_not_marked, found=_flow_tensor),
    Mistake(name="state forgotten", make=_state_forgotten, found=_flow_tensor),
    Mistake(name="RoPE base of the config", make=_rope_base_of_the_config, found=_flow_tensor),
    Mistake(name="RoPE base of the config, in text", make=_rope_base_of_the_config, found=_losses("text_loss")),
    Mistake(name="RMS weight plus one", make=_rms_plus_one, found=_flow_tensor),
    Mistake(name="RMS epsilon", make=_rms_eps, found=_flow_tensor),
    Mistake(name="GELU for SiLU", make=_gelu_for_silu, found=_flow_tensor),
    Mistake(name="actions bidirectional", make=_actions_bidirectional, found=_flow_tensor),
    Mistake(name="cross layers made self attention", make=_cross_layers_made_self_attention, found=_flow_tensor),
    Mistake(name="cross keys not projected", make=_cross_keys_not_projected, found=_flow_tensor),
    Mistake(name="cross positions behind the prefix", make=_cross_positions_behind_the_prefix, found=_flow_tensor),
    Mistake(name="cross keys rotated again", make=_cross_keys_rotated_again, found=_flow_tensor),
    Mistake(name="positions count padding", make=_positions_count_padding, found=_flow_tensor),
    Mistake(name="masked camera seen", make=_masked_camera_seen, found=_masked_camera),
    Mistake(name="time before action", make=_time_before_action, found=_suffix),
    Mistake(name="another time", make=_time_of_next_step, found=_chunks),
    Mistake(name="cross keys not projected, in steps", make=_cross_keys_not_projected, found=_chunks),
    Mistake(name="noise and actions swapped", make=_noise_and_actions_swapped, found=_flow_tensor),
    Mistake(name="delay ignored", make=mutations.delay_ignored, found=_guided),
    Mistake(name="padded steps counted", make=_padded_steps_counted, found=_masked_loss),
    Mistake(name="padded numbers counted", make=mutations.padded_numbers_count, found=_masked_loss),
    Mistake(name="padded steps divided out", make=_padded_steps_divided_out, found=_losses("flow_loss")),
    Mistake(name="flow of all samples", make=mutations.flow_of_all_samples, found=_losses("flow_loss")),
    Mistake(name="targets not causal", make=_targets_not_causal, found=_losses("text_loss")),
    Mistake(name="targets hidden from actions", make=_targets_hidden_from_actions, found=_losses("flow_loss")),
    Mistake(name="labels not shifted", make=mutations.labels_not_shifted, found=_losses("text_loss")),
    Mistake(name="z-loss", make=functools.partial(mutations.z_weight, weight=1e-4), found=_losses("text_loss")),
    Mistake(name="insulation", make=_insulated, found=_gradients),
    Mistake(name="state in the text prefix", make=_state_in_the_text_prefix, found=_text),
    Mistake(name="end token early", make=mutations.end_token_early, found=_text),
    Mistake(name="text position repeated", make=_text_position_repeated, found=_text),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_seen(
    mistake: Mistake, smolvla_golden: Golden, smolvla2_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake.must_be_seen(smolvla_golden, smolvla2_golden, monkeypatch)


@pytest.mark.parametrize("more", [1, -1])
def test_missing_cameras_are_appended_as_often_as_there_are_empty_ones(
    smolvla_golden: Golden, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """A fixture with n empty cameras names n that no batch has: case missing0 lacks n + 1, of which n are appended."""
    golden = smolvla_golden
    if golden.config["empty_cameras"] + more < 0:
        golden = _with_an_empty_camera(golden)
    errors, limit = _missing_camera(golden, golden)
    assert max(errors.values()) <= limit
    _only_so_many_appended(monkeypatch, golden.config["empty_cameras"] + more)
    # Of another length; where the prefix is padded, of other numbers.
    with pytest.raises(AssertionError, match=r"against|seen"):
        assert max(_missing_camera(golden, golden)[0].values()) <= 2 * limit, "seen"


def _with_an_empty_camera(golden: Golden) -> Golden:
    """As the fixture would be with one, by the implementation that the other tests hold to it."""
    changed = copy.copy(golden)
    cameras = [*golden.config["cameras"], "observation.images.empty_camera_0"]
    changed.config = {**golden.config, "cameras": cameras, "empty_cameras": 1}
    inputs = smol.acting(smol.inputs_of(changed, "missing0"))
    with torch.no_grad():
        prefix = smol.build(changed).embed_prefix(inputs, inputs.state)
    found = {"emb": prefix.embeddings, "pad": prefix.valid, "att": prefix.marks}
    changed.tensors = {**golden.tensors, **{f"missing0.prefix.{name}": value for name, value in found.items()}}
    return changed


def test_what_is_patched_is_put_back(smolvla: SmolVLA2Policy, smolvla_golden: Golden) -> None:
    assert max(smol.measure_flow_tensor(smolvla, smolvla_golden, "all").values()) <= smol.AIM
