"""lerobot's processor files: what it does to a sample before the network and to a chunk after it.

    policy_preprocessor.json    {"name", "steps": [{"registry_name", "config", "state_file"?}]}
    policy_postprocessor.json   likewise
    ..._normalizer_processor.safetensors    statistics, "observation.state.mean" and so on

We do the same by other means, so every step must be one whose effect we have, with the settings that we have; else it is
refused. Steps are found by their names, not by their places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from manyhands.errors import Corrupt, InvalidInput, NotFound

from .lerobot_fields import ACTION, STATE, Described
from .normalization import EPSILON, USED, Normalization, Normalizer
from .tensor_file import TensorFile

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"

Vectors = dict[str, npt.NDArray[np.float64]]

_RENAME = "rename_observations_processor"
_BATCH = "to_batch_processor"
_RELATIVE = "relative_actions_processor"
_NORMALIZE = "normalizer_processor"
_DEVICE = "device_processor"
_UNNORMALIZE = "unnormalizer_processor"
_ABSOLUTE = "absolute_actions_processor"
_STATE_TEXT = "pi05_prepare_state_tokenizer_processor_step"
_TOKENIZE = "tokenizer_processor"
_NEWLINE = "smolvla_new_line_processor"
_RENDER = "render_messages_processor"
_PI052_TEXT = "pi052_text_tokenizer"
_SMOLVLA2_TEXT = "smolvla2_chat_tokenizer"
_FAST = "action_tokenizer_processor"

# What each type does before the network, in its order.
_BEFORE: Mapping[str, tuple[str, ...]] = {
    "pi05": (_RENAME, _BATCH, _RELATIVE, _NORMALIZE, _STATE_TEXT, _TOKENIZE, _DEVICE),
    "pi052": (_RENAME, _BATCH, _RELATIVE, _NORMALIZE, _RENDER, _PI052_TEXT, _FAST, _DEVICE),
    "smolvla": (_RENAME, _BATCH, _NEWLINE, _TOKENIZE, _DEVICE, _NORMALIZE),
    "smolvla2": (_RENAME, _BATCH, _RENDER, _SMOLVLA2_TEXT, _DEVICE, _NORMALIZE),
}
_AFTER: Mapping[str, tuple[str, ...]] = {
    "pi05": (_UNNORMALIZE, _ABSOLUTE, _DEVICE),
    "pi052": (_UNNORMALIZE, _ABSOLUTE, _DEVICE),
    "smolvla": (_UNNORMALIZE, _DEVICE),
    "smolvla2": (_UNNORMALIZE, _DEVICE),
}
# What lerobot does instead where such a policy has no recipe.
_PLAIN = {"pi052": _STATE_TEXT, "smolvla2": _NEWLINE}
# Without one of these lerobot leaves out what we always do.
_NEEDED = {_NORMALIZE, _UNNORMALIZE, _STATE_TEXT, _TOKENIZE, _NEWLINE, _RENDER, _PI052_TEXT, _SMOLVLA2_TEXT}
# Of those that are there, this must be the order; the others may stand anywhere.
_ORDERED = (_RELATIVE, _NORMALIZE, _STATE_TEXT)


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What the files say beyond config.json.

    Attributes:
        renamed: The robot's names of cameras and state, by the policy's.
        state, action: Statistics as Normalizer.set() takes them; None: these numbers are not changed.
        prompt_length: Tokens, or None where no step says.
        tokenizer_name, action_tokenizer_name: Or None.
        action_names, relative_exclude: Which actions are relative, where they are; None where config.json says it.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    state: Vectors | None = None
    action: Vectors | None = None
    prompt_length: int | None = None
    tokenizer_name: str | None = None
    action_tokenizer_name: str | None = None
    action_names: tuple[str, ...] | None = None
    relative_exclude: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class _Step:
    """statistics: By feature and name, of its state file."""

    config: Mapping[str, Any]
    statistics: Mapping[str, Vectors]


# -- reading -----------------------------------------------------------------------------------------------------------


def read(folder: Path, described: Described[Any]) -> Processing | None:
    """None where the folder has neither file, as old ones.

    Raises:
        NotFound: One of the two, or a file of statistics, is missing.
        Corrupt: A file cannot be read.
        InvalidInput: A step or a setting that is not what we compute, or one file against the other; names it.
    """
    if not any((folder / name).is_file() for name in (PREPROCESSOR, POSTPROCESSOR)):
        return None
    before = _read_steps(folder, PREPROCESSOR, _BEFORE[described.type_name], described.type_name)
    after = _read_steps(folder, POSTPROCESSOR, _AFTER[described.type_name], described.type_name)
    relative = _relative(before.get(_RELATIVE), after.get(_ABSOLUTE), described)
    config = described.config
    state = _statistics(before[_NORMALIZE], PREPROCESSOR, STATE, config.state_normalization, described)
    in_training = _statistics(before[_NORMALIZE], PREPROCESSOR, ACTION, config.action_normalization, described)
    action = _statistics(after[_UNNORMALIZE], POSTPROCESSOR, ACTION, config.action_normalization, described)
    _check_same(in_training, action, f"{PREPROCESSOR} and {POSTPROCESSOR}")
    if _FAST in before:
        _check_fast(before[_FAST].config, config)
    text = next((before[name] for name in (_TOKENIZE, _PI052_TEXT, _SMOLVLA2_TEXT) if name in before), None)
    return Processing(
        renamed=_renamed(before[_RENAME].config) if _RENAME in before else {},
        state=state,
        action=action,
        prompt_length=_prompt_length(text.config) if text is not None else None,
        tokenizer_name=text.config.get("tokenizer_name") if text is not None else None,
        action_tokenizer_name=before[_FAST].config.get("action_tokenizer_name") if _FAST in before else None,
        action_names=relative[0],
        relative_exclude=relative[1],
    )


def read_old(weights: Mapping[str, torch.Tensor], described: Described[Any]) -> Processing:
    """Files from before there were processors have statistics among the weights; infinite ones were never set."""

    def find(module: str, feature: str, mode: Normalization, size: int) -> Vectors | None:
        begin = f"{module}.buffer_{feature.replace('.', '_')}."
        found = {
            name: weights[begin + name].double().reshape(-1).numpy()
            for name in USED.get(mode, ())
            if begin + name in weights
        }
        if not found or all(np.isinf(value).all() for value in found.values()):
            return None
        return _used(found, mode, feature=feature, size=size, source=module)

    config, features = described.config, described.features
    action = find("unnormalize_outputs", ACTION, config.action_normalization, features.action_size)
    in_training = find("normalize_targets", ACTION, config.action_normalization, features.action_size)
    if in_training is not None:
        _check_same(in_training, action, "normalize_targets and unnormalize_outputs")
    return Processing(state=find("normalize_inputs", STATE, config.state_normalization, features.state_size), action=action)


def _check_same(first: Vectors | None, second: Vectors | None, where: str) -> None:
    """Of one normalisation's action statistics, in two places; InvalidInput where they are not the same."""
    if (first is None) != (second is None):
        raise InvalidInput(f"{where}: only one of them has statistics of the actions", field=ACTION)
    if first is None or second is None:
        return
    for name in first:
        if not np.array_equal(first[name], second[name]):
            raise InvalidInput(
                f"{where} have different statistics {name!r}: it was not trained in the units that it acts in", field=ACTION
            )


def _read_steps(folder: Path, file_name: str, known: Sequence[str], type_name: str) -> dict[str, _Step]:
    """In the order of the file."""
    path = folder / file_name
    if not path.is_file():
        raise NotFound(f"{folder} has no {file_name}, only the other processor file", field=file_name)
    try:
        entries = json.loads(path.read_text())["steps"]
        named = [(entry.get("registry_name") or entry.get("class"), entry) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{path} is no list of processor steps: {error!r}", field=file_name) from None
    steps: dict[str, _Step] = {}
    for name, entry in named:
        if name == _PLAIN.get(type_name):
            raise InvalidInput(
                f"has the step {name!r}: trained without a recipe, on prompts that type {type_name} does not make here",
                field=file_name,
            )
        if not isinstance(name, str) or name not in known:
            raise InvalidInput(
                f"the step {name!r} is none of type {type_name}'s ({', '.join(known)}) and may change numbers; "
                "take it out of the file if it does not",
                field=file_name,
            )
        if name in steps:
            raise InvalidInput(f"the step {name!r} is there twice", field=file_name)
        config = entry.get("config") or {}
        if not isinstance(config, dict):
            raise Corrupt(f"{path}: the config of step {name!r} is {config!r}, must be an object", field=file_name)
        for key in ("norm_map", "features", "rename_map"):
            if not isinstance(config.get(key, {}), dict):
                raise Corrupt(f"{path}: {key} of step {name!r} is {config[key]!r}, must be an object", field=file_name)
        statistics = _read_statistics(folder, entry["state_file"], file_name) if entry.get("state_file") else {}
        steps[name] = _Step(config=config, statistics=statistics)
    for name in known:
        if name in _NEEDED and name not in steps:
            raise InvalidInput(f"lacks the step {name!r}; type {type_name} is not used without it here", field=file_name)
    ordered = [name for name in steps if name in _ORDERED]
    if ordered != [name for name in _ORDERED if name in steps]:
        raise InvalidInput(f"has the steps {', '.join(ordered)} in this order; it must be the other way", field=file_name)
    dtype = steps[_DEVICE].config.get("float_dtype") if _DEVICE in steps else None
    if dtype not in (None, "float32"):
        raise InvalidInput(f"{_DEVICE} rounds to {dtype!r}; only float32 is implemented", field=file_name)
    return steps


def _read_statistics(folder: Path, file_name: Any, source: str) -> dict[str, Vectors]:
    if not isinstance(file_name, str) or Path(file_name).name != file_name:
        raise InvalidInput(f"state_file is {file_name!r}, must be the name of a file beside it", field=source)
    if not (folder / file_name).is_file():
        raise NotFound(f"{folder} has no {file_name}, which {source} names", field=source)
    found: dict[str, Vectors] = {}
    for key, tensor in TensorFile(folder / file_name).items():
        feature, _, name = key.rpartition(".")
        found.setdefault(feature, {})[name] = tensor.double().reshape(-1).numpy()
    return found


def _statistics(
    step: _Step, source: str, feature: str, normalization: Normalization, described: Described[Any]
) -> Vectors | None:
    """What step does to a feature, state or action."""
    config = step.config
    kind = "STATE" if feature == STATE else "ACTION"
    size = described.features.state_size if feature == STATE else described.features.action_size
    mode = config.get("norm_map", {}).get(kind, "IDENTITY")
    if mode != normalization.name:
        raise InvalidInput(
            f"{source} normalises {kind} by {mode!r}, config.json says {normalization.name!r}", field="normalization_mapping"
        )
    if config.get("eps", EPSILON) != EPSILON:
        raise InvalidInput(f"eps is {config['eps']!r}; only {EPSILON} is implemented", field=source)
    if config.get("normalize_observation_keys") is not None and STATE not in config["normalize_observation_keys"]:
        raise InvalidInput(f"normalize_observation_keys leaves {STATE} out; that is not implemented", field=source)
    if config.get("norm_map", {}).get("VISUAL", "IDENTITY") != "IDENTITY":
        raise InvalidInput(f"{source} normalises pictures; they are taken as they are", field="normalization_mapping")
    is_listed = feature == ACTION or feature in config.get("features", {})
    if normalization is Normalization.IDENTITY or feature not in step.statistics or not is_listed:
        return None
    return _used(step.statistics[feature], normalization, feature=feature, size=size, source=source)


def _used(statistics: Vectors, normalization: Normalization, *, feature: str, size: int, source: str) -> Vectors:
    """Those of a feature's statistics that this normalisation reads, checked."""
    found = {}
    for name in USED[normalization]:
        value = statistics.get(name)
        if value is None:
            raise InvalidInput(f"{source} has no statistic {name!r} of it, which {normalization.value} needs", field=feature)
        if value.shape != (size,) or not np.isfinite(value).all():
            raise InvalidInput(
                f"{source}: statistic {name!r} has {value.size} numbers, {np.count_nonzero(np.isfinite(value))} of them "
                f"finite; it must be {size}",
                field=feature,
            )
        found[name] = value
    return found


def _relative(
    relative: _Step | None, absolute: _Step | None, described: Described[Any]
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Names of the actions and what is excluded, where only the step has them; checked against config.json."""
    is_on = getattr(described.config, "relative_actions", False)
    for name, step in ((_RELATIVE, relative), (_ABSOLUTE, absolute)):
        has = step is not None and bool(step.config.get("enabled", False))
        if has != is_on:
            raise InvalidInput(f"is {is_on} in config.json and {has} in the step {name}", field="use_relative_actions")
    if not is_on or relative is None:
        return None, None
    names = tuple(map(str, relative.config.get("action_names") or ()))
    exclude = tuple(str(part) for part in relative.config.get("exclude_joints") or () if part)
    if described.features.action_names is None:
        return (names, exclude) if names else (None, None)
    for field_name, ours, theirs in (
        ("action_feature_names", described.features.action_names, names),
        ("relative_exclude_joints", tuple(described.config.relative_exclude), exclude),
    ):
        if ours != theirs:
            raise InvalidInput(f"is {ours} in config.json and {theirs} in the step {_RELATIVE}", field=field_name)
    return None, None


def _renamed(config: Mapping[str, Any]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for robots, policys in config.get("rename_map", {}).items():
        if policys in renamed:
            raise InvalidInput(f"renames both {renamed[policys]!r} and {robots!r} to {policys!r}", field=PREPROCESSOR)
        renamed[str(policys)] = str(robots)
    return renamed


def _check_fast(step: Mapping[str, Any], config: Any) -> None:
    for name, expected in (
        ("fast_skip_tokens", config.fast_skip_tokens),
        ("max_action_tokens", config.prompts.max_action_tokens),
    ):
        if step.get(name, expected) != expected:
            raise InvalidInput(f"is {expected} in config.json and {step[name]} in the step {_FAST}", field=name)


def _prompt_length(config: Mapping[str, Any]) -> int | None:
    if config.get("tools"):
        raise InvalidInput("tells of tools in every prompt; that is not implemented", field=PREPROCESSOR)
    if config.get("padding_side", "right") != "right":
        raise InvalidInput(f"pads on the {config['padding_side']}; prompts are padded on the right", field=PREPROCESSOR)
    length = config.get("max_length")
    if not isinstance(length, int | None) or isinstance(length, bool):
        raise InvalidInput(f"is {length!r}, must be a whole number", field="max_length")
    return length


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    values: Mapping[str, Any],
    *,
    tokenizer_name: str,
    action_tokenizer_name: str,
    state: Normalizer,
    action: Normalizer,
    with_fast: bool,
) -> None:
    """Both files and their statistics.

    Args:
        values: config.json.
        tokenizer_name, action_tokenizer_name: Where lerobot loads them from.
        with_fast: The type learns FAST tokens.
    """
    relative = values.get("use_relative_actions", False)
    text = {
        "tokenizer_name": tokenizer_name,
        "max_length": values["tokenizer_max_length"],
        "padding_side": "right",
        "padding": values.get("pad_language_to", "max_length"),
    }
    dropouts = {name: values[name] for name in values if name.endswith("_dropout_prob")}
    features = {**values["input_features"], **values["output_features"]}
    norm = {"eps": EPSILON, "norm_map": values["normalization_mapping"]}
    configs: dict[str, dict[str, Any]] = {
        _RENAME: {"rename_map": {}},
        _BATCH: {},
        _RELATIVE: {
            "enabled": relative,
            "exclude_joints": values.get("relative_exclude_joints"),
            "action_names": values.get("action_feature_names"),
        },
        _NORMALIZE: norm | {"features": features},
        _STATE_TEXT: {},
        _TOKENIZE: text | {"task_key": "task", "truncation": True},
        _NEWLINE: {},
        _RENDER: {},
        _PI052_TEXT: text | dropouts,
        _SMOLVLA2_TEXT: text | dropouts,
        _FAST: {
            "action_tokenizer_name": action_tokenizer_name,
            "max_action_tokens": values.get("max_action_tokens"),
            "fast_skip_tokens": values.get("fast_skip_tokens"),
            "paligemma_tokenizer_name": tokenizer_name,
        },
        _DEVICE: {"device": "cpu", "float_dtype": None},
        _UNNORMALIZE: norm | {"features": values["output_features"]},
        _ABSOLUTE: {"enabled": relative},
    }
    statistics = {
        f"{feature}.{name}": tensor.contiguous()
        for feature, normalizer in ((STATE, state), (ACTION, action))
        for name, tensor in normalizer.statistics().items()
    }
    before = [name for name in _BEFORE[values["type"]] if name != _FAST or with_fast]
    _write_steps(folder, PREPROCESSOR, before, configs, statistics)
    _write_steps(folder, POSTPROCESSOR, _AFTER[values["type"]], configs, statistics)


def _write_steps(
    folder: Path,
    file_name: str,
    names: Sequence[str],
    configs: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, torch.Tensor],
) -> None:
    title = file_name.removesuffix(".json")
    steps = []
    for index, name in enumerate(names):
        step: dict[str, Any] = {"registry_name": name, "config": configs[name]}
        if name in (_NORMALIZE, _UNNORMALIZE) and statistics:
            step["state_file"] = f"{title}_step_{index}_{name}.safetensors"
            save_file(dict(statistics), folder / step["state_file"])
        steps.append(step)
    (folder / file_name).write_text(json.dumps({"name": title, "steps": steps}, indent=2) + "\n")
