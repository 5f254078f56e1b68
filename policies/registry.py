"""The policies there are. Closed and lazy: no peer and no file can name a class that is not here (rule 7)."""

from __future__ import annotations

import importlib
from typing import Any

from manyhands.errors import NotFound

from .policy import Policy

POLICIES: dict[str, str] = {
    "flow": "policies.flow:FlowPolicy",
    "smolvla": "policies.smolvla2.policy:SmolVLAPolicy",
    "smolvla2": "policies.smolvla2.policy:SmolVLA2Policy",
    "pi05": "policies.pi052.policy:Pi05Policy",
    "pi052": "policies.pi052.policy:Pi052Policy",
}


def policy_class(type_name: str) -> type[Policy[Any]]:
    """The class of a registered type; NotFound lists the types there are."""
    if type_name not in POLICIES:
        raise NotFound(f"policy type {type_name!r} is not one of {', '.join(sorted(POLICIES))}", field="type")
    module_name, _, class_name = POLICIES[type_name].partition(":")
    loaded: type[Policy[Any]] = getattr(importlib.import_module(module_name), class_name)
    return loaded
