"""Prompt options from the fields of lerobot's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyhands.errors import InvalidInput

from ..recipes import recipe as recipes
from ..recipes.recipe import Recipe
from ..recipes.render import PromptDropout
from .pi052 import Pi052PromptOptions
from .smolvla import SmolVLA2PromptOptions


def pi052_options(fields: Mapping[str, Any]) -> Pi052PromptOptions:
    """Of a pi05 or pi052 config; a field that is missing has its default there.

    Raises:
        InvalidInput: Names the field.
        NotFound: The recipe is no file and no shipped one.
    """
    return Pi052PromptOptions(
        recipe=_recipe(fields, "recipes/subtask_mem.yaml" if fields.get("type") == "pi052" else None),
        prompt_length=_count(fields, "tokenizer_max_length", 200),
        max_action_tokens=_count(fields, "max_action_tokens", 256),
        fast_skip_tokens=_count(fields, "fast_skip_tokens", 1152, least=0),
        dropout=_dropout(fields, as_smolvla2=False),
        joint=bool(fields.get("joint_subtask_conditioning", False)),
    )


def smolvla2_options(fields: Mapping[str, Any]) -> SmolVLA2PromptOptions:
    """Of a smolvla or smolvla2 config; raises as pi052_options()."""
    return SmolVLA2PromptOptions(
        recipe=_recipe(fields, "recipes/subtasks_vqa.yaml" if fields.get("type") == "smolvla2" else None),
        prompt_length=_count(fields, "tokenizer_max_length", 48),
        dropout=_dropout(fields, as_smolvla2=True),
    )


def _recipe(fields: Mapping[str, Any], default: str | None) -> Recipe | None:
    path = fields.get("recipe_path", default)
    if path is not None and not isinstance(path, str):
        raise InvalidInput(f"is {path!r}, must be a path or null", field="recipe_path")
    return recipes.load(path) if path else None


def _count(fields: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"is {value!r}, must be a whole number >= {least}", field=name)
    return value


def _dropout(fields: Mapping[str, Any], *, as_smolvla2: bool) -> PromptDropout:
    values = {}
    for kind in ("plan", "memory", "subtask"):
        name = f"{kind}_dropout_prob"
        value = fields.get(name) or 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInput(f"is {value!r}, must be a number between 0 and 1", field=name)
        values[kind] = float(value)
    return PromptDropout(as_smolvla2=as_smolvla2, **values)
