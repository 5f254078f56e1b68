"""lerobot's config.json of smolvla and smolvla2, read and written.

A field is ours under another name, belongs to somebody else (the optimiser, the caller of the policy), or is noted
and left. A field that we do not know is noted where it is off and refused where it is on: it may change what weights mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from .. import lerobot_fields
from ..lerobot_fields import Described
from ..normalization import Normalization
from . import config as configs
from .config import NetworkConfig, SmolVLA2Config

# Ours under another name: SmolVLA2Config.
_SAME = {
    "chunk_size": "horizon",
    "num_steps": "num_steps",
    "tokenizer_max_length": "prompt_length",
    "empty_cameras": "num_empty_cameras",
    "freeze_vision_encoder": "freeze_vision",
    "train_expert_only": "train_expert_only",
    "train_state_proj": "train_state",
}
_SAME_SMOLVLA2 = {"flow_loss_weight": "flow_weight", "text_loss_weight": "text_weight"}
# And NetworkConfig.
_SAME_NETWORK = {
    "max_state_dim": "state_size",
    "max_action_dim": "action_size",
    "min_period": "min_period",
    "max_period": "max_period",
    "add_image_special_tokens": "image_special_tokens",
}
# Read below, or equal by definition whatever they say; nothing to tell about.
_ELSEWHERE = {
    "resize_imgs_with_padding", "attention_mode", "self_attn_every_n_layers", "num_vlm_layers", "num_expert_layers",
    "expert_width_multiplier", "prefix_length", "vlm_model_name", "use_cache", "load_vlm_weights", "pad_language_to",
}  # fmt: skip
# Only this value is what we compute.
_FIXED = {"adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False}
VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
_VLM_LAYERS = 32
_WIDTH_MULTIPLIER = 0.75
_MAX_WIDTH_MULTIPLIER = 16
_KINDS: dict[str, type | tuple[type, ...]] = {
    "num_vlm_layers": int,
    "prefix_length": int,
    "self_attn_every_n_layers": int,
    "expert_width_multiplier": (int, float),
}
_RECIPE = "recipes/subtasks_vqa.yaml"
# What no field says.
BASE = NetworkConfig()


def read(values: Mapping[str, Any]) -> Described[SmolVLA2Config]:
    """Of a parsed config.json; InvalidInput names the field."""
    type_name = values.get("type")
    if type_name not in ("smolvla", "smolvla2"):
        raise InvalidInput(f"is {type_name!r}, must be 'smolvla' or 'smolvla2'", field="type")
    is_smolvla2 = type_name == "smolvla2"
    same = _SAME | (_SAME_SMOLVLA2 if is_smolvla2 else {})
    known = {*same, *_SAME_NETWORK, *_ELSEWHERE, *_FIXED, *lerobot_fields.ELSEWHERE, *lerobot_fields.PROMPTING}
    notes = lerobot_fields.notes(values, known=known, old=set())
    lerobot_fields.refuse_other(values, _FIXED)

    defaults = configs.dump(SmolVLA2Config() if is_smolvla2 else configs.smolvla_config())
    settings: dict[str, Any] = {ours: values[theirs] for theirs, ours in same.items() if theirs in values}
    settings |= lerobot_fields.read_normalization(values, Normalization.MEAN_STD)
    settings |= lerobot_fields.read_guidance(values)
    if (values.get("rtc_config") or {}).get("mode", "guided") != "guided":
        raise InvalidInput("mode must be 'guided'; these policies know no trained prefix", field="rtc_config")
    settings["network"] = _read_network(values)
    if settings.get("text_weight", defaults["text_weight"]) > 0:
        # Text trains what it reads, whatever the file says; so does lerobot.
        lerobot_fields.refuse_other(values, {"unfreeze_lm_head": True})
        settings["train_expert_only"] = False
    prompts, recipe_path = lerobot_fields.read_prompts(values, usual_recipe=_RECIPE if is_smolvla2 else None)
    return Described(
        type_name=type_name,
        config=configs.parse(defaults | settings | {"prompts": defaults["prompts"] | prompts}),
        features=lerobot_fields.read_features(values),
        recipe_path=recipe_path,
        notes=notes,
    )


def write(type_name: str, config: SmolVLA2Config, spec: Spec) -> dict[str, Any]:
    """config.json; read() of it gives the same config. Not for tower sizes of our own."""
    network = config.network
    multiplier = network.expert.width / BASE.language.width
    usual = dataclasses.replace(BASE.language, depth=network.language.depth)
    expected = dataclasses.replace(BASE, language=usual, expert=configs.expert_size(usual, multiplier))
    for name in ("vision", "language", "expert", "vocabulary", "rms_eps", "shuffle"):
        if getattr(network, name) != getattr(expected, name):
            raise InvalidInput("is no size that lerobot can write down", field=f"network.{name}")
    dumped = configs.dump(config)
    same = _SAME | (_SAME_SMOLVLA2 if type_name == "smolvla2" else {})
    values: dict[str, Any] = {
        "type": type_name,
        "n_obs_steps": 1,
        "n_action_steps": config.horizon,
        **lerobot_fields.write_features(spec),
        **lerobot_fields.write_normalization(config.state_normalization, config.action_normalization),
        "device": "cpu",
        **{theirs: dumped[ours] for theirs, ours in same.items()},
        **{theirs: dumped["network"][ours] for theirs, ours in _SAME_NETWORK.items()},
        "vlm_model_name": VLM,
        "load_vlm_weights": False,
        "resize_imgs_with_padding": [network.image_width, network.image_height],
        "num_vlm_layers": network.language.depth,
        "num_expert_layers": -1,
        "expert_width_multiplier": multiplier,
        "attention_mode": "cross_attn",
        "self_attn_every_n_layers": network.self_attention_every,
        "prefix_length": network.prefix_length or -1,
        "pad_language_to": "max_length",
        **lerobot_fields.write_guidance(config.prefix_schedule, config.max_guidance_weight, {}),
    }
    if type_name == "smolvla2":
        values |= lerobot_fields.write_prompts(config.prompts)
    return values


def _read_network(values: Mapping[str, Any]) -> dict[str, Any]:
    lerobot_fields.refuse_other(values, {"vlm_model_name": VLM})
    lerobot_fields.check_kinds(values, _KINDS)
    attention_mode = values.get("attention_mode", "cross_attn")
    if attention_mode not in ("cross_attn", "self_attn"):
        raise InvalidInput(f"is {attention_mode!r}, must be 'cross_attn' or 'self_attn'", field="attention_mode")
    size = lerobot_fields.pair(values, "resize_imgs_with_padding", (512, 512))
    depth = values.get("num_vlm_layers", BASE.language.depth)
    depth = _VLM_LAYERS if depth <= 0 else depth
    if values.get("num_expert_layers", -1) not in (-1, 0, depth):
        raise InvalidInput(
            f"is {values['num_expert_layers']}; only an expert as deep as the language tower ({depth}) is implemented",
            field="num_expert_layers",
        )
    language = dataclasses.replace(BASE.language, depth=depth)
    multiplier = values.get("expert_width_multiplier", _WIDTH_MULTIPLIER)
    if not 0 < multiplier <= _MAX_WIDTH_MULTIPLIER:
        raise InvalidInput(
            f"is {multiplier}, must be over 0, up to {_MAX_WIDTH_MULTIPLIER}", field="expert_width_multiplier"
        )
    expert = configs.expert_size(language, multiplier)
    every = 1 if attention_mode == "self_attn" else max(0, values.get("self_attn_every_n_layers", 2))
    dumped = configs.dump(SmolVLA2Config(network=dataclasses.replace(BASE, language=language, expert=expert)))["network"]
    return {
        **dumped,
        **{ours: values[theirs] for theirs, ours in _SAME_NETWORK.items() if theirs in values},
        "image_width": size[0],
        "image_height": size[1],
        "self_attention_every": every,
        "prefix_length": max(0, values.get("prefix_length", -1)),
    }
