"""Sizes that fix the shapes of the large policies' weights, as their configurations hold them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

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
    """One tower, of Gemma 2B's heads unless told otherwise. Both towers of a model have the same depth, heads and head_dim: the expert reads the other's keys."""

    __pydantic_config__ = STRICT

    width: PositiveInt
    depth: PositiveInt
    mlp: PositiveInt
    heads: PositiveInt = 8
    kv_heads: PositiveInt = 1
    head_dim: PositiveInt = 256
