"""Tests of the tests: each likely mistake, made on purpose, must be seen by the parity check that is there for it.

The fixtures must hold what their README promises: prompts that would begin with a location or a code, a minimum of tokens,
samples with different numbers of codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from policies import attention, flow_matching, images, losses, text
from policies.pi052 import flow, gemma, masks
from policies.pi052 import model as pi052_model
from policies.pi052.policy import Pi052Policy

from . import mutations, pi
from .golden import Golden
from .mutations import Measured, Mistake, Patch


def _flow_tensor(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_flow_tensor(pi.build(pi05), pi05, "all"), pi.AIM


def _time(pi05: Golden, _: Golden) -> Measured:
    return {"time_emb": pi.measure_time(pi.build(pi05), pi05)["time_emb"]}, pi.TIME_LIMIT


def _condition(pi05: Golden, _: Golden) -> Measured:
    return {"adarms_cond": pi.measure_time(pi.build(pi05), pi05)["adarms_cond"]}, pi.AIM


def _chunks(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_chunks(pi.build(pi05), pi05, "all"), pi.AIM


def _guided(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_guided(pi.build(pi05), pi05), pi.AIM


def _pictures(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_pictures(pi05), pi.PICTURE_LIMIT


def _missing_camera(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_prefix(pi.build(pi05), pi05, "missing0."), pi.AIM


def _missing_camera_flow(pi05: Golden, _: Golden) -> Measured:
    return pi.measure_flow_tensor(pi.build(pi05), pi05, "missing1"), pi.AIM


def _prefix(_: Golden, pi052: Golden) -> Measured:
    return pi.measure_prefix(pi.build(pi052), pi052), pi.AIM


def _losses(case: str, *names: str) -> Callable[[Golden, Golden], Measured]:
    def measure(_: Golden, pi052: Golden) -> Measured:
        policy = pi.build(pi052, **pi.case_settings(pi052, case))
        errors = pi.measure_losses(policy, pi052, case)
        return {name: errors[name] for name in names or errors}, pi.LOSS_AIM

    return measure


def _gradients(_: Golden, pi052: Golden) -> Measured:
    policy = pi.build(pi052, **pi.case_settings(pi052, "K1_ki1"))
    return pi.measure_gradients(policy, pi052, "K1_ki1"), pi.GRADIENT_LIMIT


def _insulated_gradient(_: Golden, pi052: Golden) -> Measured:
    policy = pi.build(pi052)
    torch.autograd.backward(policy.loss_of(pi.inputs_of(pi052), pi.draws_of(pi052, 5)).terms["flow"].sum())
    parts = (policy.network.language, policy.network.vision, policy.network.projector)
    grads = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
    return {"language": float(sum(float(g.abs().sum()) for g in grads))}, 0.0


def _joint(_: Golden, pi052: Golden) -> Measured:
    return pi.measure_joint_chunks(pi.build(pi052), pi052), pi.AIM


def _text(_: Golden, pi052: Golden) -> Measured:
    policy = pi.build(pi052)
    return mutations.first_wrong(lambda case: pi.generated_ids(policy, pi052, case) != case["ids"], pi052.meta["select"])


# -- the mistakes ------------------------------------------------------------------------------------------------------


def _rms_eps(patch: Patch) -> None:
    patch.setattr(gemma, "RMS_EPS", 1e-5)


def _rope_base(patch: Patch) -> None:
    patch.setattr(attention, "ROPE_BASE", 100_000.0)


def _interleaved_rope(patch: Patch) -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        half = cos.shape[-1] // 2
        return x * cos[..., :half].repeat_interleave(2, -1) + turned * sin[..., :half].repeat_interleave(2, -1)

    patch.setattr(gemma, "rotate", rotate)


def _time_in_float32(patch: Patch) -> None:
    def embed_time(time: torch.Tensor, size: int, min_period: float, max_period: float) -> torch.Tensor:
        period = min_period * (max_period / min_period) ** torch.linspace(0.0, 1.0, size // 2)
        angle = 2.0 * math.pi * time[..., None] / period
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    patch.setattr(pi052_model, "embed_time", embed_time)


def _one_silu(patch: Patch) -> None:
    def condition(self: pi052_model.Pi052Network, time: torch.Tensor) -> torch.Tensor:
        config = self.config
        embedded = pi052_model.embed_time(time, config.expert.width, config.min_period, config.max_period)
        out: torch.Tensor = self.time_out(functional.silu(self.time_in(embedded)))
        return out

    patch.setattr(pi052_model.Pi052Network, "condition", condition)


def _shift_before_scale(patch: Patch) -> None:
    real = gemma.AdaptiveRmsNorm.forward

    def forward(self: gemma.AdaptiveRmsNorm, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        swapped = gemma.AdaptiveRmsNorm(x.shape[-1], condition.shape[-1])
        scale, shift, gate = self.modulation.weight.detach().chunk(3)
        bias_scale, bias_shift, bias_gate = self.modulation.bias.detach().chunk(3)
        swapped.modulation.weight = torch.nn.Parameter(torch.cat([shift, scale, gate]))
        swapped.modulation.bias = torch.nn.Parameter(torch.cat([bias_shift, bias_scale, bias_gate]))
        return real(swapped, x, condition)

    patch.setattr(gemma.AdaptiveRmsNorm, "forward", forward)


def _embeddings_scaled_twice(patch: Patch) -> None:
    real = pi052_model.Pi052Network.embed_tokens

    def embed_tokens(self: pi052_model.Pi052Network, tokens: torch.Tensor) -> torch.Tensor:
        return real(self, tokens) * math.sqrt(self.config.language.width)

    patch.setattr(pi052_model.Pi052Network, "embed_tokens", embed_tokens)


def _pictures_scaled(patch: Patch) -> None:
    real = pi052_model.Pi052Network.encode_pictures

    def encode_pictures(self: pi052_model.Pi052Network, pictures: torch.Tensor) -> torch.Tensor:
        return real(self, pictures) / math.sqrt(self.config.language.width)

    patch.setattr(pi052_model.Pi052Network, "encode_pictures", encode_pictures)


def _insulation_off(patch: Patch) -> None:
    patch.setattr(pi052_model.PrefixState, "insulated", lambda self: self)


def _only_keys_insulated(patch: Patch) -> None:
    def insulated(self: pi052_model.PrefixState) -> pi052_model.PrefixState:
        return replace(self, keys_values=[(k.detach(), v) for k, v in self.keys_values])

    patch.setattr(pi052_model.PrefixState, "insulated", insulated)


def _only_values_insulated(patch: Patch) -> None:
    def insulated(self: pi052_model.PrefixState) -> pi052_model.PrefixState:
        return replace(self, keys_values=[(k, v.detach()) for k, v in self.keys_values])

    patch.setattr(pi052_model.PrefixState, "insulated", insulated)


def _text_insulated_too(patch: Patch) -> None:
    """Keys and values detached where the prefix itself uses them."""
    real = gemma.attend
    patch.setattr(gemma, "attend", lambda q, k, v, bias: real(q, k.detach(), v.detach(), bias))


def _fast_visible_to_actions(patch: Patch) -> None:
    """Seen, but the positions as they should be."""
    real_positions, real_visible = masks.suffix_positions, masks.visible_to_actions
    counted: list[torch.Tensor] = []

    def visible(valid: torch.Tensor, is_fast: torch.Tensor) -> torch.Tensor:
        counted[:] = [real_visible(valid, is_fast)]
        return valid

    patch.setattr(masks, "visible_to_actions", visible)
    patch.setattr(masks, "suffix_positions", lambda _, repeats, horizon: real_positions(counted[0], repeats, horizon))


def _positions_after_fast(patch: Patch) -> None:
    """Not seen, but counted."""
    real_positions, real_visible = masks.suffix_positions, masks.visible_to_actions
    counted: list[torch.Tensor] = []

    def visible(valid: torch.Tensor, is_fast: torch.Tensor) -> torch.Tensor:
        counted[:] = [valid]
        return real_visible(valid, is_fast)

    patch.setattr(masks, "visible_to_actions", visible)
    patch.setattr(masks, "suffix_positions", lambda _, repeats, horizon: real_positions(counted[0], repeats, horizon))


def _positions_from_one(patch: Patch) -> None:
    """Rotary attention knows only differences: what must be seen is the actions standing one step too far."""
    real = masks.suffix_positions
    patch.setattr(masks, "suffix_positions", lambda *arguments: real(*arguments) + 1)


def _positions_count_padding(patch: Patch) -> None:
    patch.setattr(masks, "prefix_positions", lambda valid: torch.arange(valid.shape[1]).expand(valid.shape))


def _targets_not_causal(patch: Patch) -> None:
    real = masks.prefix_attention

    def prefix_attention(valid: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        return real(valid, torch.zeros_like(marks))

    patch.setattr(masks, "prefix_attention", prefix_attention)


def _prompt_causal(patch: Patch) -> None:
    real = masks.prefix_attention
    patch.setattr(masks, "prefix_attention", lambda valid, marks: real(valid, torch.ones_like(marks)))


def _fast_not_causal(patch: Patch) -> None:
    """All of it is one block."""
    real = pi052_model.Pi052Network.embed_prefix

    def embed_prefix(self: pi052_model.Pi052Network, *arguments: Any, **named: Any) -> pi052_model.Prefix:
        prefix = real(self, *arguments, **named)
        marks = prefix.marks.clone()
        marks[:, marks.shape[1] - prefix.num_fast + 1 :] = False
        return replace(prefix, marks=marks)

    patch.setattr(pi052_model.Pi052Network, "embed_prefix", embed_prefix)


def _prompt_sees_fast(patch: Patch) -> None:
    real_embed, real_attention = pi052_model.Pi052Network.embed_prefix, masks.prefix_attention
    fast: list[torch.Tensor] = []

    def embed_prefix(self: pi052_model.Pi052Network, *arguments: Any, **named: Any) -> pi052_model.Prefix:
        prefix = real_embed(self, *arguments, **named)
        fast[:] = [prefix.is_fast]
        return prefix

    def prefix_attention(valid: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        seen = valid[:, :, None] & (valid & fast[0])[:, None, :] & ~fast[0][None, :, None]
        return real_attention(valid, marks) | seen

    patch.setattr(pi052_model.Pi052Network, "embed_prefix", embed_prefix)
    patch.setattr(masks, "prefix_attention", prefix_attention)


def _targets_hidden(patch: Patch, *, from_fast: bool) -> None:
    """From FAST tokens, or else from actions, where they keep their positions."""
    real_embed, real_attention = pi052_model.Pi052Network.embed_prefix, masks.prefix_attention
    real_visible, real_positions = masks.visible_to_actions, masks.suffix_positions
    seen: dict[str, torch.Tensor] = {}

    def embed_prefix(self: pi052_model.Pi052Network, *arguments: Any, **named: Any) -> pi052_model.Prefix:
        prefix = real_embed(self, *arguments, **named)
        seen["fast"], seen["targets"] = prefix.is_fast, prefix.marks & ~prefix.is_fast
        return prefix

    def prefix_attention(valid: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        return real_attention(valid, marks) & ~(seen["fast"][None, :, None] & seen["targets"][:, None, :])

    def visible(valid: torch.Tensor, is_fast: torch.Tensor) -> torch.Tensor:
        seen["counted"] = real_visible(valid, is_fast)
        return seen["counted"] & ~seen["targets"]

    patch.setattr(pi052_model.Pi052Network, "embed_prefix", embed_prefix)
    if from_fast:
        patch.setattr(masks, "prefix_attention", prefix_attention)
    else:
        patch.setattr(masks, "visible_to_actions", visible)
        patch.setattr(
            masks, "suffix_positions", lambda _, repeats, horizon: real_positions(seen["counted"], repeats, horizon)
        )


def _actions_causal(patch: Patch) -> None:
    real = masks.suffix_attention

    def suffix_attention(visible: torch.Tensor, repeats: int, horizon: int) -> torch.Tensor:
        allowed = real(visible, repeats, horizon)
        own = torch.ones(repeats * horizon, repeats * horizon, dtype=torch.bool).tril()
        return torch.cat([allowed[..., : visible.shape[1]], allowed[..., visible.shape[1] :] & own], dim=2)

    patch.setattr(masks, "suffix_attention", suffix_attention)


def _repeats_see_each_other(patch: Patch) -> None:
    real = masks.suffix_attention

    def suffix_attention(visible: torch.Tensor, repeats: int, horizon: int) -> torch.Tensor:
        return real(visible, 1, repeats * horizon)

    patch.setattr(masks, "suffix_attention", suffix_attention)


def _repeats_continue_positions(patch: Patch) -> None:
    real = masks.suffix_positions
    patch.setattr(masks, "suffix_positions", lambda visible, repeats, horizon: real(visible, 1, repeats * horizon))


def _sample_major_repeats(patch: Patch) -> None:
    patch.setattr(flow, "_by_row", lambda values, repeats: values.view(-1, repeats, *values.shape[1:]))


def _padded_steps_left_out(patch: Patch, is_pad: torch.Tensor) -> None:
    real = losses.flow_term

    def flow_term(errors: torch.Tensor, predicts: torch.Tensor, **arguments: Any) -> losses.Term:
        counted = (~is_pad)[:, None].expand(errors.shape[:3])
        return real(errors, predicts, **(arguments | {"counted": counted}))

    patch.setattr(losses, "flow_term", flow_term)


def _z_loss_on_fast(patch: Patch) -> None:
    def fast_term(logits: torch.Tensor, targets: losses.Targets) -> losses.Term:
        return losses.text_term(logits, targets, z_weight=1e-4)

    patch.setattr(losses, "fast_term", fast_term)


def _fast_mean_over_tokens(patch: Patch) -> None:
    patch.setattr(losses, "fast_term", lambda logits, targets: losses.text_term(logits, targets, z_weight=0.0))


def _fast_wrapping_learnt(patch: Patch) -> None:
    real = losses.fast_targets
    patch.setattr(losses, "fast_targets", lambda tokens, is_code, predicts: real(tokens, torch.ones_like(is_code), predicts))


def _fast_not_shifted(patch: Patch) -> None:
    def fast_targets(tokens: torch.Tensor, is_code: torch.Tensor, predicts: torch.Tensor) -> losses.Targets:
        row, position = (is_code & predicts[:, None]).nonzero(as_tuple=True)
        return losses.Targets(row=row, position=position, token=tokens[row, position], num_rows=tokens.shape[0])

    patch.setattr(losses, "fast_targets", fast_targets)


def _fast_of_all_samples(patch: Patch) -> None:
    real = losses.fast_targets
    patch.setattr(losses, "fast_targets", lambda tokens, is_code, predicts: real(tokens, is_code, torch.ones_like(predicts)))


def _tied_head(patch: Patch) -> None:
    patch.setattr(
        pi052_model.Pi052Network, "text_logits", lambda self, hidden: functional.linear(hidden, self.token_table.weight)
    )


def _pad_before_scaling(patch: Patch) -> None:
    real = functional.pad
    patch.setattr(functional, "pad", lambda x, sizes, value: real(x, sizes, value=-1.0))


def _pad_left_top(patch: Patch) -> None:
    real = images.resize_with_padding
    patch.setattr(images, "resize_with_padding", lambda p, h, w, _: real(p, h, w, images.Padding.LEFT_TOP))


def _antialias(patch: Patch) -> None:
    patch.setattr(functional, "interpolate", functools.partial(functional.interpolate, antialias=True))


def _missing_camera_seen(patch: Patch) -> None:
    real = images.prepare_cameras

    def prepare_cameras(*arguments: Any, **named: Any) -> images.Pictures:
        pictures = real(*arguments, **named)
        return replace(pictures, valid=tuple(torch.ones_like(valid) for valid in pictures.valid))

    patch.setattr(images, "prepare_cameras", prepare_cameras)


def _time_from_next_step(patch: Patch) -> None:
    """Integrates with the time at the end of each step."""

    def euler(velocity: Any, noise: torch.Tensor, num_steps: int, **_: Any) -> torch.Tensor:
        x = noise
        for step in range(num_steps):
            x = x - velocity(x, torch.full((x.shape[0],), 1.0 - (step + 1) / num_steps)) / num_steps
        return x

    patch.setattr(flow_matching, "euler", euler)


def _locations_allowed(patch: Patch) -> None:
    patch.setattr(text, "END_LOCATION", text.FIRST_LOCATION)


def _codes_allowed(patch: Patch) -> None:
    """As with fast_skip_tokens 128, where the range is empty."""
    real = text.allowed_logits
    patch.setattr(
        text, "allowed_logits", lambda logits, rules, count: real(logits, replace(rules, fast_skip_tokens=128), count)
    )


def _text_position_repeated(patch: Patch) -> None:
    """The new token stands where the last one stood."""
    real = gemma.GemmaTower.forward

    def forward(self: gemma.GemmaTower, x: torch.Tensor, positions: torch.Tensor, *rest: Any, **named: Any) -> Any:
        is_text_step = x.shape[1] == 1 and named.get("condition_BGC") is None
        return real(self, x, positions - int(is_text_step), *rest, **named)

    patch.setattr(gemma.GemmaTower, "forward", forward)


MISTAKES = [
    Mistake(name="exact GELU", make=mutations.exact_gelu, found=_flow_tensor),
    Mistake(name="RMS epsilon", make=_rms_eps, found=_flow_tensor),
    Mistake(name="RoPE base", make=_rope_base, found=_flow_tensor),
    Mistake(name="RoPE interleaved", make=_interleaved_rope, found=_flow_tensor),
    Mistake(name="time embedding in float32", make=_time_in_float32, found=_time),
    Mistake(name="no second silu", make=_one_silu, found=_condition),
    Mistake(name="adaptive norm in another order", make=_shift_before_scale, found=_flow_tensor),
    Mistake(name="embeddings scaled twice", make=_embeddings_scaled_twice, found=_prefix),
    Mistake(name="pictures scaled", make=_pictures_scaled, found=_prefix),
    Mistake(name="insulation off", make=_insulation_off, found=_insulated_gradient),
    Mistake(name="insulation off, seen in gradients", make=_insulation_off, found=_gradients),
    Mistake(name="only keys insulated", make=_only_keys_insulated, found=_insulated_gradient),
    Mistake(name="only values insulated", make=_only_values_insulated, found=_insulated_gradient),
    Mistake(name="text insulated too", make=_text_insulated_too, found=_gradients),
    Mistake(name="FAST visible to actions", make=_fast_visible_to_actions, found=_losses("K1_ki1", "flow_loss")),
    Mistake(name="positions after FAST", make=_positions_after_fast, found=_losses("K1_ki1", "flow_loss")),
    Mistake(name="positions from one", make=_positions_from_one, found=_flow_tensor),
    Mistake(name="positions count padding", make=_positions_count_padding, found=_missing_camera_flow),
    Mistake(name="targets not causal", make=_targets_not_causal, found=_losses("K1_ki1", "text_loss")),
    Mistake(name="given text not causal", make=_targets_not_causal, found=_joint),
    Mistake(name="prompt causal", make=_prompt_causal, found=_flow_tensor),
    Mistake(name="prompt sees FAST", make=_prompt_sees_fast, found=_losses("K1_ki1", "text_loss")),
    Mistake(name="FAST not causal", make=_fast_not_causal, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(
        name="targets hidden from FAST",
        make=functools.partial(_targets_hidden, from_fast=True),
        found=_losses("K1_ki1", "fast_action_loss"),
    ),
    Mistake(
        name="targets hidden from actions",
        make=functools.partial(_targets_hidden, from_fast=False),
        found=_losses("K1_ki1", "flow_loss"),
    ),
    Mistake(name="actions causal", make=_actions_causal, found=_flow_tensor),
    Mistake(name="repeats see each other", make=_repeats_see_each_other, found=_losses("K5_ki1", "flow_loss")),
    Mistake(name="repeats continue positions", make=_repeats_continue_positions, found=_losses("K5_ki1", "flow_loss")),
    Mistake(name="sample-major repeats", make=_sample_major_repeats, found=_losses("K5_ki1", "flow_loss")),
    Mistake(name="padded numbers count", make=mutations.padded_numbers_count, found=_losses("K1_ki1", "flow_loss")),
    Mistake(name="flow of all samples", make=mutations.flow_of_all_samples, found=_losses("K1_ki1", "flow_loss")),
    Mistake(name="no z-loss", make=functools.partial(mutations.z_weight, weight=0.0), found=_losses("K1_ki1", "text_loss")),
    Mistake(name="z-loss on FAST", make=_z_loss_on_fast, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(name="FAST mean over tokens", make=_fast_mean_over_tokens, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(name="FAST wrapping learnt", make=_fast_wrapping_learnt, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(name="FAST not shifted", make=_fast_not_shifted, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(name="FAST of all samples", make=_fast_of_all_samples, found=_losses("K1_ki1", "fast_action_loss")),
    Mistake(name="labels not shifted", make=mutations.labels_not_shifted, found=_losses("K1_ki1", "text_loss")),
    Mistake(name="head tied to the table", make=_tied_head, found=_losses("K1_ki1", "text_loss")),
    Mistake(name="padding before scaling", make=_pad_before_scaling, found=_pictures),
    Mistake(name="padding left and top", make=_pad_left_top, found=_pictures),
    Mistake(name="antialiasing", make=_antialias, found=_pictures),
    Mistake(name="missing camera seen", make=_missing_camera_seen, found=_missing_camera),
    Mistake(name="time of the next step", make=_time_from_next_step, found=_chunks),
    Mistake(name="delay ignored", make=mutations.delay_ignored, found=_guided),
    Mistake(name="locations allowed", make=_locations_allowed, found=_text),
    Mistake(name="codes allowed", make=_codes_allowed, found=_text),
    Mistake(name="end token early", make=mutations.end_token_early, found=_text),
    Mistake(name="text position repeated", make=_text_position_repeated, found=_text),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_seen(
    mistake: Mistake, pi05_golden: Golden, pi052_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake.must_be_seen(pi05_golden, pi052_golden, monkeypatch)


def test_padded_steps_must_count(pi052_golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """action_is_pad is in the batch, and pi052 does not look at it."""
    assert pi052_golden["in.action_is_pad"].any()
    _padded_steps_left_out(monkeypatch, pi052_golden["in.action_is_pad"])
    errors, limit = _losses("K1_ki1", "flow_loss")(pi052_golden, pi052_golden)
    assert max(errors.values()) > 2 * limit


def test_what_is_patched_is_put_back(pi05: Pi052Policy, pi05_golden: Golden) -> None:
    assert max(pi.measure_flow_tensor(pi05, pi05_golden, "all").values()) <= pi.AIM
