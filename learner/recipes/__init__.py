"""The recipes there are: name -> module with a function recipe() -> Recipe. Closed: a peer names one, it brings none."""

from __future__ import annotations

import importlib

from manyhands.errors import InvalidInput

from ..recipe import Recipe

RECIPES: dict[str, str] = {
    "flow_metaworld": "learner.recipes.flow_metaworld",
    "flow_smoke": "learner.recipes.flow_smoke",
    "pi05": "learner.recipes.pi05",
    "pi052": "learner.recipes.pi052",
    "pi052_smoke": "learner.recipes.pi052_smoke",
    "smolvla": "learner.recipes.smolvla",
    "smolvla2": "learner.recipes.smolvla2",
    "smolvla2_smoke": "learner.recipes.smolvla2_smoke",
}


def build_recipe(name: str) -> Recipe:
    """InvalidInput lists the recipes there are."""
    if name not in RECIPES:
        raise InvalidInput(f"recipe {name!r} is not one of {', '.join(sorted(RECIPES))}", field="run.recipe")
    recipe: Recipe = importlib.import_module(RECIPES[name]).recipe()
    return recipe
