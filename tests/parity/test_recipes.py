"""Row 13: recipes render as the reference does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from policies.recipes import recipe as recipes
from policies.recipes.annotations import Annotations
from policies.recipes.recipe import Recipe
from policies.recipes.render import render

from . import golden_text

Frame = dict[str, Any]


def all_recipes() -> dict[str, Recipe]:
    fixture = golden_text.read("recipes.json")
    shipped = {name: recipes.load(name) for name in fixture["shipped_recipes"]}
    return shipped | {own["name"]: recipes.parse(own["recipe"], name=own["name"]) for own in fixture["own_recipes"]}


def result_of(recipe: Recipe, frame: Frame, rows: list[dict[str, Any]]) -> object:
    """In the form of the fixture."""
    annotations = Annotations.of({"persistent": rows, "events": frame["events"]})
    try:
        messages = render(recipe, annotations, time_s=frame["t"], index=frame["sample_idx"], task=frame["task"])
    except ValueError:
        return "ValueError"
    if messages is None:
        return None
    return {
        "messages": [message.to_json() for message in messages],
        "message_streams": [message.stream for message in messages],
        "target_message_indices": [index for index, message in enumerate(messages) if message.is_target],
    }


def test_every_frame() -> None:
    fixture = golden_text.read("recipes.json")
    known = all_recipes()
    compared: Counter[str] = Counter()
    for frame in fixture["frames"]:
        found = result_of(known[frame["recipe"]], frame, fixture["episodes"][frame["episode"]])
        assert found == frame["result"], frame
        compared[frame["recipe"]] += 1
    assert set(compared) == set(known)
    assert min(compared.values()) > 5
