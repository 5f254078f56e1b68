"""What the configurations of the large policies are made of: bounded numbers, sizes of towers, and their JSON form."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from manyhands.errors import InvalidInput

ConfigT = TypeVar("ConfigT")

PositiveInt = Annotated[int, Field(gt=0, le=1 << 20)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Precision(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"  # Projections and tables; norms, vision, state, action and time projections stay float32.


@dataclass(frozen=True, kw_only=True)
class VisionSize:
    """SigLIP So400m/14 unless told otherwise."""

    __pydantic_config__ = STRICT

    width: PositiveInt = 1152
    depth: PositiveInt = 27
    mlp: PositiveInt = 4304
    heads: PositiveInt = 16
    patch: PositiveInt = 14


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """One tower. Both towers of a model have the same depth, heads and head_dim: the expert reads the other's keys."""

    __pydantic_config__ = STRICT

    width: PositiveInt
    depth: PositiveInt
    mlp: PositiveInt
    heads: PositiveInt = 8
    kv_heads: PositiveInt = 1
    head_dim: PositiveInt = 256


def check_towers(language: TowerSize, expert: TowerSize) -> None:
    """InvalidInput names what does not fit together."""
    for name in ("depth", "heads", "kv_heads", "head_dim"):
        ours, theirs = getattr(expert, name), getattr(language, name)
        if ours != theirs:
            raise InvalidInput(f"is {ours}, must equal language.{name} ({theirs})", field=f"network.expert.{name}")
    if language.heads % language.kv_heads:
        raise InvalidInput(
            f"is {language.heads}, must be a multiple of kv_heads ({language.kv_heads})", field="network.language.heads"
        )
    if language.head_dim % 2:
        raise InvalidInput(f"is {language.head_dim}, must be even for rotary positions", field="network.language.head_dim")
    if expert.width % 2:
        raise InvalidInput(f"is {expert.width}, must be even for sines and cosines", field="network.expert.width")


def check_vision(vision: VisionSize, height: int, width: int, *, patches_in_cell: int = 1) -> None:
    """height and width of pictures in pixels; a token is made of patches_in_cell patches to a side."""
    cell = vision.patch * patches_in_cell
    for name, pixels in (("image_height", height), ("image_width", width)):
        if pixels % cell:
            raise InvalidInput(f"is {pixels}, must be a multiple of {cell}, the pixels of a token", field=f"network.{name}")
    if vision.width % vision.heads:
        raise InvalidInput(f"is {vision.heads}, must divide width ({vision.width})", field="network.vision.heads")


def parse(adapter: TypeAdapter[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """From the JSON-able form; InvalidInput names the key."""
    try:
        return adapter.validate_json(json.dumps(dict(values)))
    except ValidationError as error:
        first = error.errors()[0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, InvalidInput):  # Of a __post_init__, which names the field from the top.
            raise InvalidInput(ours.message, field=f"config.{ours.field}") from None
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{first['msg']}; got {first['input']!r}", field=f"config.{name}") from None
    except TypeError as error:
        raise InvalidInput(f"is not JSON: {error}", field="config") from None


def dump(adapter: TypeAdapter[ConfigT], config: ConfigT) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(adapter.dump_json(config))
    return values
