"""lerobot's config.json of pi05 and pi052, read and written.

A field is ours under another name, belongs to somebody else (the optimiser, the caller of the policy), or is noted
and left. A field that we do not know is noted where it is off and refused where it is on: it may change what weights mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from .. import lerobot_fields, vectors
from ..configuration import Precision
from ..lerobot_fields import Described
from ..normalization import Normalization
from . import config as configs
from .config import TOWERS, ChunkMode, NetworkConfig, Pi052Config

# Ours under another name: Pi052Config.
_SAME = {
    "chunk_size": "horizon",
    "num_inference_steps": "num_steps",
    "tokenizer_max_length": "prompt_length",
    "empty_cameras": "num_empty_cameras",
    "use_relative_actions": "relative_actions",
    "rtc_training_max_delay": "trained_prefix_max_delay",
    "train_expert_only": "train_expert_only",
    "freeze_vision_encoder": "freeze_vision",
}
_SAME_PI052 = {
    "flow_loss_weight": "flow_weight",
    "text_loss_weight": "text_weight",
    "text_ce_z_loss_weight": "z_weight",
    "flow_num_repeats": "flow_repeats",
    "knowledge_insulation": "knowledge_insulation",
    "fast_skip_tokens": "fast_skip_tokens",
    "backbone_lr_scale": "backbone_lr_scale",
    "action_expert_lr_scale": "expert_lr_scale",
    "lm_head_lr_scale": "head_lr_scale",
}
# And NetworkConfig.
_SAME_NETWORK = {
    "max_action_dim": "action_size",
    "min_period": "min_period",
    "max_period": "max_period",
    "gradient_checkpointing": "gradient_checkpointing",
}
# Read below, of the trainer, or equal by definition whatever they say (kernels); nothing to tell about.
_ELSEWHERE = {
    "paligemma_variant", "action_expert_variant", "dtype", "image_resolution", "max_state_dim", "action_feature_names",
    "relative_exclude_joints", "enable_fast_action_loss", "fast_action_loss_weight", "optimizer_foreach", "optimizer_fused",
    "use_flashrt_adarms", "use_compiled_text_ce", "use_compiled_vision", "use_flex_attention", "use_manual_attention",
    "manual_attention_scope", "use_flashrt_fp8_mlp", "memory_frames", "memory_stride", "memory_temporal_attention_every",
    "action_tokenizer_name", "max_action_tokens", "joint_subtask_conditioning", "subtask_replan_steps",
    "auto_fit_fast_tokenizer", "fast_tokenizer_cache_dir", "fast_tokenizer_fit_samples",
    "fast_tokenizer_validation_samples", "fast_tokenizer_max_reconstruction_rmse", "fast_tokenizer_max_dim_rmse",
}  # fmt: skip
# Without meaning here; noted.
_OLD = {"use_hf_kernels"}
_SAME_PROMPTS = {"max_action_tokens": "max_action_tokens", "joint_subtask_conditioning": "joint"}
# Only this value is what we compute.
_FIXED = {
    "time_sampling_beta_alpha": 1.5,
    "time_sampling_beta_beta": 1.0,
    "time_sampling_scale": 0.999,
    "time_sampling_offset": 0.001,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
}
_KINDS = {"relative_exclude_joints": list, "dtype": str, "paligemma_variant": str, "action_expert_variant": str}
_RECIPE = "recipes/subtask_mem.yaml"
_FAST = "physical-intelligence/fast"
_STATE_SIZE = 32
# What no field says.
BASE = NetworkConfig()


def read(values: Mapping[str, Any]) -> Described[Pi052Config]:
    """Of a parsed config.json; InvalidInput names the field."""
    type_name = values.get("type")
    if type_name not in ("pi05", "pi052"):
        raise InvalidInput(f"is {type_name!r}, must be 'pi05' or 'pi052'", field="type")
    is_pi052 = type_name == "pi052"
    same = _SAME | (_SAME_PI052 if is_pi052 else {})
    known = {*same, *_SAME_NETWORK, *_ELSEWHERE, *_FIXED, *lerobot_fields.ELSEWHERE, *lerobot_fields.PROMPTING}
    notes = lerobot_fields.notes(values, known=known, old=_OLD)
    lerobot_fields.refuse_other(values, _FIXED)
    lerobot_fields.check_kinds(values, _KINDS)
    features = lerobot_fields.read_features(values)

    settings: dict[str, Any] = {ours: values[theirs] for theirs, ours in same.items() if theirs in values}
    if "relative_exclude_joints" in values:
        settings["relative_exclude"] = [part for part in values["relative_exclude_joints"] if part]
    if features.action_names is None and settings.get("relative_actions"):
        # There is nothing to know them by: lerobot then takes all as relative.
        settings["relative_exclude"] = []
    if is_pi052:
        enabled = values.get("enable_fast_action_loss", True)
        settings["fast_weight"] = values.get("fast_action_loss_weight", 1.0) if enabled else 0.0
    settings |= lerobot_fields.read_normalization(values, Normalization.QUANTILES)
    settings |= lerobot_fields.read_guidance(values)
    if values.get("rtc_config") is not None:
        settings["chunk_mode"] = values["rtc_config"].get("mode", ChunkMode.GUIDED.value)
    settings["network"] = _network(values)
    defaults = configs.dump(Pi052Config() if is_pi052 else configs.pi05_config())
    prompts, recipe_path = lerobot_fields.read_prompts(values, usual_recipe=_RECIPE if is_pi052 else None)
    prompts |= {ours: values[theirs] for theirs, ours in _SAME_PROMPTS.items() if theirs in values and is_pi052}
    return Described(
        type_name=type_name,
        config=configs.parse(defaults | settings | {"prompts": defaults["prompts"] | prompts}),
        features=features,
        recipe_path=recipe_path,
        action_tokenizer_name=values.get("action_tokenizer_name", _FAST) if is_pi052 else None,
        notes=notes,
    )


def write(type_name: str, config: Pi052Config, spec: Spec) -> dict[str, Any]:
    """config.json; read() of it gives the same config. Not for tower sizes of our own."""
    network = config.network
    variants = {size: name for name, size in TOWERS.items()}
    for name in ("language", "expert"):
        if getattr(network, name) not in variants:
            raise InvalidInput("is no size that lerobot has a name for", field=f"network.{name}")
    for name in ("vision", "vocabulary"):
        if getattr(network, name) != getattr(BASE, name):
            raise InvalidInput("is not what lerobot has; it cannot be written down there", field=f"network.{name}")
    dumped = configs.dump(config)
    same = _SAME | (_SAME_PI052 if type_name == "pi052" else {})
    is_trained = config.chunk_mode is ChunkMode.TRAINED
    values: dict[str, Any] = {
        "type": type_name,
        "n_obs_steps": 1,
        "n_action_steps": config.horizon,
        **lerobot_fields.write_features(spec),
        "action_feature_names": lerobot_fields.write_action_names(spec),
        **lerobot_fields.write_normalization(config.state_normalization, config.action_normalization),
        "device": "cpu",
        "dtype": network.precision.value,
        "paligemma_variant": variants[network.language],
        "action_expert_variant": variants[network.expert],
        "image_resolution": [network.image_height, network.image_width],
        "max_state_dim": max(_STATE_SIZE, vectors.size(spec.states)),
        "relative_exclude_joints": list(config.relative_exclude),
        **{theirs: dumped[ours] for theirs, ours in same.items()},
        **{theirs: dumped["network"][ours] for theirs, ours in _SAME_NETWORK.items()},
        **lerobot_fields.write_guidance(
            config.prefix_schedule, config.max_guidance_weight, {"mode": config.chunk_mode.value} if is_trained else {}
        ),
    }
    if not config.trained_prefix_max_delay:
        del values["rtc_training_max_delay"]  # Newer than 0.6.1, which refuses fields that it does not know.
    if type_name == "pi052":
        values |= {"enable_fast_action_loss": config.fast_weight > 0, "fast_action_loss_weight": config.fast_weight or 1.0}
        values |= lerobot_fields.write_prompts(config.prompts)
        values |= {theirs: dumped["prompts"][ours] for theirs, ours in _SAME_PROMPTS.items()}
    return values


def _network(values: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {ours: values[theirs] for theirs, ours in _SAME_NETWORK.items() if theirs in values}
    dumped = configs.dump(Pi052Config(network=BASE))["network"]
    towers = (("paligemma_variant", "language", "gemma_2b"), ("action_expert_variant", "expert", "gemma_300m"))
    for theirs, ours, usual in towers:
        name = values.get(theirs, usual)
        if name not in TOWERS:
            raise InvalidInput(f"is {name!r}, must be one of {', '.join(TOWERS)}", field=theirs)
        settings[ours] = dataclasses.asdict(TOWERS[name])
    dtype = values.get("dtype", "float32")
    if dtype not in {precision.value for precision in Precision}:
        raise InvalidInput(f"is {dtype!r}, must be 'float32' or 'bfloat16'", field="dtype")
    height, width = lerobot_fields.pair(values, "image_resolution", (224, 224))
    settings |= {"precision": dtype, "image_height": height, "image_width": width}
    return {**dumped, **settings}
