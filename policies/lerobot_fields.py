"""What the config.json files of all of lerobot's policies have in common."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import NoneType
from typing import Any, Generic, TypeVar

from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec

from . import files as policy_files
from . import vectors
from .normalization import Normalization
from .prompts.settings import PromptSettings
from .recipes.recipe import SHIPPED
from .rtc import DEFAULT_MAX_GUIDANCE_WEIGHT, PrefixSchedule

STATE = "observation.state"
ACTION = "action"

ConfigT = TypeVar("ConfigT")

# Of the trainer, of the machine, of the caller, or equal by definition whatever they say; nothing to tell about.
ELSEWHERE = frozenset({
    "type", "n_obs_steps", "n_action_steps", "input_features", "output_features", "device", "use_amp", "use_peft",
    "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path", "pretrained_revision",
    "normalization_mapping", "rtc_config", "compile_model", "compile_mode", "optimizer_lr", "optimizer_betas",
    "optimizer_eps", "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps",
    "scheduler_decay_steps", "scheduler_decay_lr", "recipe_path", "apply_chat_template", "unfreeze_lm_head",
})  # fmt: skip
# lerobot's to PromptSettings.
_DROPOUT = {
    "plan_dropout_prob": "plan_dropout",
    "memory_dropout_prob": "memory_dropout",
    "subtask_dropout_prob": "subtask_dropout",
}
PROMPTING = frozenset(_DROPOUT)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Attributes:
    cameras: (height, width) of each, in the order the model takes them; without empty cameras.
    state_size, action_size: Numbers of the robot.
    action_names: Of each action, or None.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_size: int
    action_size: int
    action_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Described(Generic[ConfigT]):
    """What a config.json says.

    Attributes:
        config: What the network, its losses and its prompts need.
        recipe_path: A recipe that is none of the shipped ones and has to be found; config has none then.
        action_tokenizer_name: Of the FAST tokenizer, or None where it has none.
        notes: What was left out, for the user.
    """

    type_name: str
    config: ConfigT
    features: Features
    recipe_path: str | None
    action_tokenizer_name: str | None = None
    notes: tuple[str, ...]


def read_features(values: Mapping[str, Any]) -> Features:
    inputs, outputs = values.get("input_features") or {}, values.get("output_features") or {}
    names = values.get("action_feature_names")
    try:
        return Features(
            cameras={
                name: (int(feature["shape"][1]), int(feature["shape"][2]))
                for name, feature in inputs.items()
                if feature["type"] == "VISUAL" and ".empty_camera_" not in name
            },
            state_size=int(inputs[STATE]["shape"][0]) if STATE in inputs else 0,
            action_size=int(outputs[ACTION]["shape"][0]) if ACTION in outputs else 0,
            action_names=None if names is None else tuple(map(str, names)),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise InvalidInput("must map names to {type, shape}", field="input_features, output_features") from None


def derive_spec(features: Features, renamed: Mapping[str, str], control_rate_hz: float) -> Spec:
    """renamed: The robot's names by the policy's."""
    if not features.action_size:
        raise InvalidInput(f"names no {ACTION!r}; it says what the policy is for", field="output_features")
    observation = [
        Feature(name=renamed.get(name, name), kind=FeatureKind.IMAGE, dtype="uint8", shape=(*size, 3))
        for name, size in features.cameras.items()
    ]
    if features.state_size:
        name = renamed.get(STATE, STATE)
        observation.append(Feature(name=name, kind=FeatureKind.STATE, dtype="float32", shape=(features.state_size,)))
    names = features.action_names or ()
    if names and len(names) != features.action_size:
        raise InvalidInput(f"has {len(names)} names for {features.action_size} actions", field="action_feature_names")
    action = Feature(
        name=ACTION, kind=FeatureKind.ACTION, dtype="float32", shape=(features.action_size,), element_names=names
    )
    return Spec(observation=tuple(observation), action=(action,), control_rate_hz=control_rate_hz)


def check_spec(spec: Spec, features: Features, derived: Spec, notes: list[str]) -> Spec:
    """spec, where the checkpoint can be used for it."""
    known = [feature.name for feature in derived.images]
    alternatives = list(features.cameras)
    places = []
    for feature in spec.images:
        found = [names.index(feature.name) for names in (known, alternatives) if feature.name in names]
        if not found:
            raise InvalidInput(f"is no camera of this checkpoint, which has {', '.join(known)}", field=feature.name)
        places.append(found[0])
    if places != sorted(set(places)):
        raise InvalidInput(f"must have the cameras in the checkpoint's order: {', '.join(known)}", field="spec.observation")
    for index in sorted(set(range(len(known))) - set(places)):
        notes.append(f"the robot has no camera {known[index]}; the policy acts without it")
    for name, size, limit in (
        ("spec.observation", vectors.size(spec.states), features.state_size),
        ("spec.action", vectors.size(spec.action), features.action_size),
    ):
        if size > limit:
            raise InvalidInput(f"has {size} numbers, the checkpoint is for {limit}", field=name)
    return spec


def write_features(spec: Spec) -> dict[str, Any]:
    cameras = {feature.name: feature.shape for feature in spec.images}
    for name in cameras:
        if not name.startswith("observation."):
            raise InvalidInput("lerobot only reads cameras whose names begin with 'observation.'; rename it", field=name)
    state_size = vectors.size(spec.states)
    return {
        "input_features": {
            **{name: {"type": "VISUAL", "shape": [3, *shape[:2]]} for name, shape in cameras.items()},
            **({STATE: {"type": "STATE", "shape": [state_size]}} if state_size else {}),
        },
        "output_features": {ACTION: {"type": "ACTION", "shape": [vectors.size(spec.action)]}},
    }


def write_action_names(spec: Spec) -> list[str] | None:
    """None where they say no more than that it is one vector of actions."""
    first = spec.action[0]
    return None if spec.action == (first,) and first.name == ACTION and not first.element_names else _names(spec)


def read_normalization(values: Mapping[str, Any], usual: Normalization) -> dict[str, str]:
    """state_normalization and action_normalization of our configurations."""
    check_kinds(values, {"normalization_mapping": (dict, NoneType)})
    mapping = values.get("normalization_mapping") or {}
    if mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise InvalidInput(f"VISUAL is {mapping['VISUAL']!r}; pictures are taken as they are", field="normalization_mapping")
    return {
        "state_normalization": _normalization(mapping.get("STATE", usual.name)).value,
        "action_normalization": _normalization(mapping.get("ACTION", usual.name)).value,
    }


def write_normalization(state: Normalization, action: Normalization) -> dict[str, Any]:
    return {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": state.name, "ACTION": action.name}}


def read_guidance(values: Mapping[str, Any]) -> dict[str, Any]:
    """prefix_schedule and max_guidance_weight of our configurations, where rtc_config is given."""
    check_kinds(values, {"rtc_config": (dict, NoneType)})
    rtc = values.get("rtc_config")
    if rtc is None:
        return {}
    schedule = str(rtc.get("prefix_attention_schedule", "LINEAR")).upper()
    if schedule not in PrefixSchedule.__members__:
        raise InvalidInput(f"is {schedule!r}, must be one of {', '.join(PrefixSchedule.__members__)}", field="rtc_config")
    return {
        "prefix_schedule": PrefixSchedule[schedule].value,
        "max_guidance_weight": rtc.get("max_guidance_weight", DEFAULT_MAX_GUIDANCE_WEIGHT),
    }


def write_guidance(schedule: PrefixSchedule, max_weight: float, more: Mapping[str, Any]) -> dict[str, Any]:
    """rtc_config: null where all is usual. Off otherwise: lerobot's plain loop refuses a policy that has it on."""
    if schedule is PrefixSchedule.LINEAR and max_weight == DEFAULT_MAX_GUIDANCE_WEIGHT and not more:
        return {"rtc_config": None}
    if max_weight <= 0:
        raise InvalidInput("is 0; lerobot only knows guidance that pulls, so it must be > 0", field="max_guidance_weight")
    settings = {"enabled": False, "prefix_attention_schedule": schedule.name, "max_guidance_weight": max_weight}
    return {"rtc_config": {**settings, **more}}


def read_prompts(values: Mapping[str, Any], *, usual_recipe: str | None) -> tuple[dict[str, Any], str | None]:
    """Our prompt settings, and the path of a recipe that is not shipped.

    Args:
        usual_recipe: Where the field is not given. None: this type has no recipes, whatever the field says.
    """
    settings: dict[str, Any] = {ours: values[theirs] for theirs, ours in _DROPOUT.items() if values.get(theirs) is not None}
    path = values.get("recipe_path", usual_recipe) if usual_recipe is not None else None
    if path is not None and not isinstance(path, str):
        raise InvalidInput(f"is {path!r}, must be a path or null", field="recipe_path")
    shipped = shipped_recipe(path or "")
    return settings | {"recipe": shipped or ""}, None if shipped else path or None


def write_prompts(settings: PromptSettings) -> dict[str, Any]:
    name = settings.recipe
    path = name if name == policy_files.RECIPE else f"recipes/{name}.yaml"
    return {
        "recipe_path": path if name else None,
        **{theirs: getattr(settings, ours) for theirs, ours in _DROPOUT.items()},
    }


def shipped_recipe(path: str) -> str | None:
    """The name of the recipe of ours that lerobot's own path stands for."""
    return next((name for name in SHIPPED if path in (name, f"recipes/{name}.yaml")), None)


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Of the fields that are read one by one; InvalidInput names one that is something else."""
    for name, kind in kinds.items():
        if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise InvalidInput(f"is {values[name]!r}, must be of type {names}", field=name)


def pair(values: Mapping[str, Any], name: str, usual: tuple[int, int]) -> tuple[int, int]:
    value = values.get(name, usual)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidInput(f"is {value!r}, must be two whole numbers", field=name)
    return value[0], value[1]


def refuse_other(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Only these values are what we compute."""
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise InvalidInput(f"is {values[name]!r}; only {expected!r} is implemented", field=name)


def notes(values: Mapping[str, Any], *, known: Set[str], old: Set[str]) -> tuple[str, ...]:
    """A field that we do not know is noted where it is off and refused where it is on. old: Without meaning; noted."""
    found = []
    for name in sorted(values.keys() - known):
        if name in old:
            found.append(f"{name} has no meaning any more and is ignored")
        elif values[name]:
            raise InvalidInput(
                f"is {values[name]!r}; this field is not known and may change what the weights mean", field=name
            )
        else:
            found.append(f"{name} is not known; it is off, and ignored")
    return tuple(found)


def _names(spec: Spec) -> list[str]:
    return vectors.element_names(spec.action)


def _normalization(name: Any) -> Normalization:
    if not isinstance(name, str) or name not in Normalization.__members__:
        raise InvalidInput(f"{name!r} is not one of {', '.join(Normalization.__members__)}", field="normalization_mapping")
    return Normalization[name]
