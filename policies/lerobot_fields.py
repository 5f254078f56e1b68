"""What the config.json files of all of lerobot's policies have in common."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from . import vectors
from .normalization import Normalization
from .rtc import DEFAULT_MAX_GUIDANCE_WEIGHT, PrefixSchedule


@dataclass(frozen=True, kw_only=True)
class Features:
    """Attributes:
    cameras: (height, width) of each, in the order the model takes them; without empty cameras.
    state_size, action_size: Numbers of the robot.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_size: int
    action_size: int


def read_features(values: Mapping[str, Any]) -> Features:
    inputs, outputs = values.get("input_features") or {}, values.get("output_features") or {}
    return Features(
        cameras={
            name: (feature["shape"][1], feature["shape"][2])
            for name, feature in inputs.items()
            if feature["type"] == "VISUAL" and ".empty_camera_" not in name
        },
        state_size=sum(feature["shape"][0] for feature in inputs.values() if feature["type"] == "STATE"),
        action_size=sum(feature["shape"][0] for feature in outputs.values() if feature["type"] == "ACTION"),
    )


def write_features(spec: Spec) -> dict[str, Any]:
    cameras = {feature.name: feature.shape for feature in spec.images}
    return {
        "input_features": {
            **{name: {"type": "VISUAL", "shape": [3, *shape[:2]]} for name, shape in cameras.items()},
            "observation.state": {"type": "STATE", "shape": [vectors.size(spec.states)]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [vectors.size(spec.action)]}},
    }


def read_normalization(values: Mapping[str, Any], usual: Normalization) -> dict[str, str]:
    """state_normalization and action_normalization of our configurations."""
    mapping = values.get("normalization_mapping", {})
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


def _normalization(name: str) -> Normalization:
    if name not in Normalization.__members__:
        raise InvalidInput(f"{name!r} is not one of {', '.join(Normalization.__members__)}", field="normalization_mapping")
    return Normalization[name]
