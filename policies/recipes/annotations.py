"""Language rows of an episode, and the four ways a recipe picks one of them at a moment.

A persistent row (a subtask, a memory) stands on every frame of its episode with the time it began. An event (an
interjection, a question about a picture) stands only on the frame it happened at and has no time of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from manyhands.errors import InvalidInput

from ..samples import check_text

PERSISTENT_STYLES = frozenset({"subtask", "plan", "memory", "motion", "task_aug"})
EVENT_STYLES = frozenset({"interjection", "vqa", "trace"})
CAMERA_STYLES = frozenset({"vqa", "trace"})
ROLES = ("user", "assistant", "system", "tool")

# A persistent row counts as emitted on frames this close to its time.
EMITTED_WITHIN_S = 0.1

_RESOLVERS = ("active_at", "emitted_at", "nth_prev", "nth_next")
_CALL = re.compile(r"^\s*(\w+)\s*\((.*)\)\s*$", re.DOTALL)
_SELECTORS = ("style", "role", "tool_name", "camera")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Attributes:
    timestamp_s: When a persistent row began, in its episode; None for an event.
    tool_calls: [{"type": "function", "function": {"name": ..., "arguments": ...}}, ...].
    """

    role: str
    content: str | None = None
    style: str | None = None
    timestamp_s: float | None = None
    camera: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def calls(self, tool_name: str) -> bool:
        return any(_called(call) == tool_name for call in self.tool_calls)


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What a frame knows: the episode's persistent rows and its own events."""

    persistent: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()

    @classmethod
    def of(cls, value: Mapping[str, Any] | None) -> Annotations:
        """From {"persistent": [row, ...], "events": [row, ...]}, rows with the columns of lerobot's data sets.

        Raises InvalidInput, which names the row.
        """
        value = value or {}
        return cls(
            persistent=tuple(_row(row, f"persistent[{i}]", True) for i, row in enumerate(_listed(value, "persistent"))),
            events=tuple(_row(row, f"events[{i}]", False) for i, row in enumerate(_listed(value, "events"))),
        )


def _listed(value: Mapping[str, Any], name: str, where: str = "annotations.") -> Sequence[Any]:
    """Lists as Python or as NumPy has them; what is missing is empty."""
    found = value.get(name)
    if not isinstance(found, list | tuple | np.ndarray | None):
        raise InvalidInput(f"is of type {type(found).__name__}, must be a list", field=f"{where}{name}")
    return () if found is None else list(found)


def _row(value: object, where: str, is_persistent: bool) -> Row:
    field_name = f"annotations.{where}"
    if not isinstance(value, Mapping):
        raise InvalidInput(f"is {value!r:.80}, must map role, content and so on", field=field_name)
    for name in ("role", "content", "style", "camera"):
        if value.get(name) is not None:
            check_text(value[name], f"{field_name}.{name}")
    role, style, camera, timestamp = (value.get(name) for name in ("role", "style", "camera", "timestamp"))
    if role not in ROLES:
        raise InvalidInput(f"role is {role!r}, must be one of {', '.join(ROLES)}", field=field_name)
    if (camera is not None) != (style in CAMERA_STYLES):
        rule = "needs a camera" if camera is None else f"must not have a camera ({camera!r})"
        raise InvalidInput(f"style {style!r} {rule}", field=field_name)
    if is_persistent:
        if style in EVENT_STYLES:
            raise InvalidInput(f"style {style!r} happens on single frames, it cannot be persistent", field=field_name)
        is_number = isinstance(timestamp, int | float | np.floating) and not isinstance(timestamp, bool)
        if not is_number or not math.isfinite(cast(float, timestamp)):
            raise InvalidInput(f"timestamp is {timestamp!r}; a persistent row has one, in seconds", field=field_name)
    elif style in PERSISTENT_STYLES:
        raise InvalidInput(f"style {style!r} is persistent, it cannot be an event", field=field_name)
    return Row(
        role=role,
        content=value.get("content"),
        style=style,
        timestamp_s=_stored_time(timestamp) if is_persistent else None,
        camera=camera,
        tool_calls=tuple(_tool_call(call, field_name) for call in _listed(value, "tool_calls", f"{field_name}.")),
    )


def _tool_call(value: object, field_name: str) -> Mapping[str, Any]:
    """Data sets keep it as it is or as its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping):
        raise InvalidInput("has a tool call that is no object", field=field_name)
    return value


def _called(call: Mapping[str, Any]) -> str | None:
    function = call.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def _stored_time(time_s: Any) -> float:
    """Data sets keep float32: a frame and a row of the same moment must compare equal, however each was computed."""
    return float(np.float32(time_s))


@dataclass(frozen=True, kw_only=True)
class Binding:
    """How a name in a recipe finds its row.

    Attributes:
        resolver: active_at (the persistent row in force), emitted_at (what begins or happens now), nth_prev and nth_next
            (offset rows before or after the one in force).
        selector: What the row must have: style, role, tool_name, camera.
        offset: Of nth_prev and nth_next, from 1.
    """

    resolver: str
    selector: Mapping[str, str] = field(default_factory=dict)
    offset: int = 1

    def resolve(self, annotations: Annotations, time_s: float) -> Row | None:
        """The row, or None.

        Raises InvalidInput if more than one fits.
        """
        time_s = _stored_time(time_s)
        if self.resolver == "emitted_at" and self.selector.get("style") not in PERSISTENT_STYLES:
            return self._only([row for row in annotations.events if self._fits(row)])
        times = [(row.timestamp_s, row) for row in annotations.persistent if row.timestamp_s is not None and self._fits(row)]
        if self.resolver == "emitted_at":
            return self._only([row for time, row in times if abs(time - time_s) <= EMITTED_WITHIN_S])
        begun = [time for time, _ in times if time <= time_s]
        if self.resolver == "active_at":
            return self._only([row for time, row in times if time == max(begun)]) if begun else None
        ordered = [row for _, row in sorted(times, key=lambda pair: (pair[0], pair[1].style or "", pair[1].role))]
        steps = self.offset if self.resolver == "nth_next" else -self.offset
        # Before the first row the place is -1: nth_next(1) is the first row, and nothing comes before.
        place = len(begun) - 1 + steps
        return ordered[place] if 0 <= place < len(ordered) else None

    def _fits(self, row: Row) -> bool:
        for name, wanted in self.selector.items():
            fits = row.calls(wanted) if name == "tool_name" else getattr(row, name) == wanted
            if not fits:
                return False
        return True

    def _only(self, rows: Sequence[Row]) -> Row | None:
        if len(rows) > 1:
            raise InvalidInput(
                f"{self} fits {len(rows)} rows of one frame; select by role, tool_name or camera as well",
                field="annotations",
            )
        return rows[0] if rows else None

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in self.selector.items()]
        given += [f"offset={self.offset}"] if self.resolver.startswith("nth") else []
        return f"{self.resolver}({', '.join(given)})"


def parse_binding(text: object) -> Binding:
    """Of "active_at(t, style=subtask)" and the like; ValueError says what is wrong."""
    match = _CALL.match(text) if isinstance(text, str) else None
    if match is None or match[1] not in _RESOLVERS:
        raise ValueError(f"is {text!r}; write one of {', '.join(_RESOLVERS)} with arguments, as active_at(t, style=subtask)")
    resolver = match[1]
    arguments = [part.strip() for part in match[2].split(",") if part.strip()]
    selector: dict[str, str] = {}
    offset = 1
    if arguments and arguments[0] == "t":  # The time is always the frame's; it may be named.
        arguments = arguments[1:]
    for argument in arguments:
        name, equals, value = (part.strip() for part in argument.partition("="))
        value = value.strip("'\"")
        if not equals or not value or name in selector:
            raise ValueError(f"has argument {argument!r}; arguments are name=value, each once")
        if name == "offset" and resolver.startswith("nth"):
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"has offset {value!r}; it must be a whole number from 1")
            offset = int(value)
        elif name in _SELECTORS:
            selector[name] = value
        else:
            raise ValueError(f"has argument {name!r}, which {resolver} does not take")
    _check_selector(resolver, selector)
    return Binding(resolver=resolver, selector=selector, offset=offset)


def _check_selector(resolver: str, selector: Mapping[str, str]) -> None:
    style = selector.get("style")
    if style is not None and style not in PERSISTENT_STYLES | EVENT_STYLES:
        raise ValueError(f"has style {style!r}, must be one of {', '.join(sorted(PERSISTENT_STYLES | EVENT_STYLES))}")
    if resolver != "emitted_at" and style in EVENT_STYLES:
        raise ValueError(f"asks {resolver} for style {style!r}, which happens on single frames; use emitted_at")
    if "role" in selector and selector["role"] not in ROLES:
        raise ValueError(f"has role {selector['role']!r}, must be one of {', '.join(ROLES)}")
    if not selector:
        raise ValueError(f"selects nothing; name at least one of {', '.join(_SELECTORS)}")
