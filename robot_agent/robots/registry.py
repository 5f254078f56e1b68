"""Robots by name. Closed: a robot is chosen by whoever starts the agent, from this list, never by a peer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import pydantic

from manyhands.errors import InvalidInput, NotFound

from ..robot import Robot

# Name -> "module:Class", imported when asked for, so that one robot's SDK is not needed to run another.
ROBOTS: dict[str, str] = {
    "arm": "robot_agent.robots.arm:SimulatedArm",
    "metaworld": "robot_agent.robots.metaworld:MetaWorldRobot",
}


def robot_class(name: str) -> type[Robot]:
    """NotFound lists the robots there are; Refused (from the module) says which extra is missing."""
    if name not in ROBOTS:
        raise NotFound(f"robot {name!r} is not one of {', '.join(sorted(ROBOTS))}", field="robot")
    module, _, attribute = ROBOTS[name].partition(":")
    found: type[Robot] = getattr(importlib.import_module(module), attribute)
    return found


def create(name: str, options: Mapping[str, object]) -> Robot:
    """Builds a robot, not yet connected. InvalidInput names the first option that is unknown or impossible."""
    cls = robot_class(name)
    try:
        checked = cls.Options.model_validate(dict(options))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(cls.Options.model_fields)
        raise InvalidInput(
            f"{first['msg']} (got {first['input']!r}); {name} has {known}", field=f"options.{where}"
        ) from None
    return cls(checked)  # type: ignore[call-arg]
