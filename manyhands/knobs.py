"""What one setting looks like from outside: its flag, variable, shape, default and limits, read off a pydantic model."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class KnobKind(enum.Enum):
    VALUE = "one value"
    SWITCH = "--flag or --no-flag"
    LIST = "repeated"
    MAP = "repeated KEY=VALUE"


class _Positional:
    """Marker of a field that is given without its flag's name."""


# Annotated[Path, POSITIONAL]: given in the order of declaration; a list takes all that are left.
POSITIONAL = _Positional()

_SUFFIX_METAVARS = {
    "_s": "SECONDS",
    "_ms": "MILLISECONDS",
    "_hz": "HZ",
    "_bytes": "BYTES",
    "_mib": "MIB",
    "_gib": "GIB",
    "_rad": "RADIANS",
    "_m": "METRES",
    "_px": "PIXELS",
    "_steps": "STEPS",
    "_port": "PORT",
    "_address": "HOST:PORT",
}


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting that has no settings below it.

    Attributes:
        path: Field names from the outermost model to the field.
        item: Type of the value, or of one item of a list or mapping.
        structured: The value is a table or a list of tables, which a flag or variable gives as JSON.
    """

    path: tuple[str, ...]
    info: FieldInfo
    kind: KnobKind
    item: Any
    structured: bool
    positional: bool

    @property
    def flag(self) -> str:
        return "--" + ".".join([*self.path[:-1], self._flag_name]).replace("_", "-")

    @property
    def negated_flag(self) -> str:
        return "--" + ".".join([*self.path[:-1], f"no-{self._flag_name}"]).replace("_", "-")

    @property
    def _flag_name(self) -> str:
        # json_schema_extra={"flag": "json"} is for names that a pydantic model cannot have as fields.
        extra = self.info.json_schema_extra
        return str(extra.get("flag", self.path[-1])) if isinstance(extra, dict) else self.path[-1]

    @property
    def variable(self) -> str:
        return "MANYHANDS_" + "__".join(self.path).upper()

    @property
    def numeric_items(self) -> bool:
        return self.item in (int, float)

    @property
    def metavar(self) -> str:
        name = self.path[-1]
        if self.positional:
            return name.upper().replace("_", "-")
        if self.kind is KnobKind.MAP:
            return "KEY=VALUE"
        if self.kind is KnobKind.LIST and self.numeric_items:
            return "NUMBER,NUMBER"
        if choices := self.choices:
            return "{" + ",".join(choices) + "}"
        if name == "address":
            return "HOST:PORT"
        for suffix, metavar in _SUFFIX_METAVARS.items():
            if name.endswith(suffix) and (self.item in (int, float) or suffix == "_address"):
                return metavar
        return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(self.item, "JSON" if self.structured else "TEXT")

    @property
    def choices(self) -> tuple[str, ...]:
        if get_origin(self.item) is Literal:
            return tuple(str(value) for value in get_args(self.item))
        if isinstance(self.item, type) and issubclass(self.item, enum.Enum):
            return tuple(str(member.value) for member in self.item)
        return ()

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def default_text(self) -> str:
        """As a person writes it; "" for none and for empty lists, mappings and texts."""
        if self.info.default_factory is not None:
            default = self.info.get_default(call_default_factory=True, validated_data={})
        else:
            default = self.info.default
        if default is PydanticUndefined or default is None or default in ("", (), [], {}):
            return ""
        if isinstance(default, bool):
            return "on" if default else "off"
        if isinstance(default, enum.Enum):
            return str(default.value)
        if isinstance(default, dict):
            return " ".join(f"{key}={value}" for key, value in default.items())
        if isinstance(default, list | tuple):
            return " ".join(str(value) for value in default)
        return str(default)

    @property
    def limits_text(self) -> str:
        """As "> 0, at most 60"; "" where the field's type is its only limit."""
        words = {"gt": "> ", "ge": "at least ", "lt": "< ", "le": "at most "}
        limits: list[str] = []
        for bound in self.info.metadata:
            for attribute, text in words.items():
                limit = getattr(bound, attribute, None)
                if limit is not None:
                    limits.append(f"{text}{limit}")
        return ", ".join(limits)


def walk_knobs(model: type[BaseModel], parents: tuple[str, ...] = ()) -> list[Knob]:
    """Every setting of model and of the models nested in it, in order of declaration, a base class's own fields last."""
    own = [name for name in model.model_fields if name not in _inherited(model)]
    knobs: list[Knob] = []
    for name in [*own, *(name for name in model.model_fields if name not in own)]:
        info = model.model_fields[name]
        path = (*parents, name)
        nested = nested_model(info.annotation)
        knobs.extend([_knob(path, info)] if nested is None else walk_knobs(nested, path))
    return knobs


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The one model that annotation is, or may be besides None."""
    bare = _bare(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _inherited(model: type[BaseModel]) -> set[str]:
    return {name for base in model.__bases__ if issubclass(base, BaseModel) for name in base.model_fields}


def _bare(annotation: Any) -> Any:
    """annotation without Annotated and without "or None"."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _knob(path: tuple[str, ...], info: FieldInfo) -> Knob:
    annotation = _bare(info.annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    positional = any(isinstance(mark, _Positional) for mark in info.metadata)
    item, kind = annotation, KnobKind.VALUE
    if annotation is bool:
        kind = KnobKind.SWITCH
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        kind, item = KnobKind.MAP, _bare(arguments[1])
    elif isinstance(origin, type) and issubclass(origin, Iterable):
        kind, item = KnobKind.LIST, _bare(arguments[0])
    inner = get_origin(item)
    structured = nested_model(item) is not None or (isinstance(inner, type) and issubclass(inner, Iterable))
    return Knob(path=path, info=info, kind=kind, item=item, structured=structured, positional=positional)
