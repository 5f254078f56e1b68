"""Does the recipe of messages fit the data? Found out before the first step, from a sample of frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from manyhands.errors import InvalidInput
from policies.policy import Policy
from policies.prompted import PromptedPolicy
from policies.prompts.settings import PromptSettings, recipe_of
from policies.recipes.annotations import Annotations
from policies.recipes.recipe import Recipe
from policies.recipes.render import Frame, render, survey, task_variant

from .data import Demonstrations

_MAX_EPISODES = 256
_FRAMES_OF_AN_EPISODE = 4
_MAX_EVENT_FRAMES = 1024


def check(policy: Policy[Any], demonstrations: Demonstrations) -> tuple[str, ...]:
    """Notes for people: how often each component of the recipe has messages.

    Raises:
        InvalidInput: A component never has any; there is no recipe, though text is to be learnt; some frames have nothing
            to say, neither a task nor annotations that the recipe uses.
    """
    if not isinstance(policy, PromptedPolicy):
        return ()
    recipe = _recipe(policy)
    _check_tasks(recipe, demonstrations)
    if recipe is None:
        return ()
    counts = survey(recipe, _frames(demonstrations))
    parts = ", ".join(f"{component.name} {counts[component.name]}" for component in recipe.components)
    return (f"recipe {recipe.name}: of {counts['']} frames looked at, have messages: {parts}",)


def _recipe(policy: PromptedPolicy[Any, Any]) -> Recipe | None:
    """What training renders with; None for policies that act on their task alone."""
    settings = getattr(policy.config, "prompts", None)
    if policy.config.byte_prompts or not policy.has_text_head or not isinstance(settings, PromptSettings):
        return None
    recipe = recipe_of(policy.files, settings.recipe)
    if recipe is None and getattr(policy.config, "text_weight", 0.0) > 0:
        raise InvalidInput(
            "is empty and text_weight is over 0: no frame would teach text; name a recipe, or set text_weight to 0",
            field="prompts.recipe",
        )
    return recipe


def _check_tasks(recipe: Recipe | None, demonstrations: Demonstrations) -> None:
    bare = [index for index in demonstrations.frames_without_task().tolist() if not _says(recipe, demonstrations, index)]
    if bare:
        raise InvalidInput(
            f"has {len(bare)} of {demonstrations.num_frames} frames with neither a task nor annotations that are used, "
            f"the first is {bare[0]}; give their episodes a task or annotations, or leave them out",
            field="run.dataset",
        )


def _says(recipe: Recipe | None, demonstrations: Demonstrations, index: int) -> bool:
    """Whether a frame without a task has messages all the same."""
    if recipe is None:
        return False
    sample = demonstrations.frame(index)
    annotations = Annotations.of(sample.annotations)
    if task_variant(annotations, index):
        return True
    return render(recipe, annotations, time_s=sample.timestamp_s, index=index, task=None) is not None


def _frames(demonstrations: Demonstrations) -> Iterator[Frame]:
    """Of episodes spread over the data: some frames, and those at which a persistent row begins; and frames with events."""
    ranges = demonstrations.episode_ranges()
    chosen = set(_spread(demonstrations.event_frames(), _MAX_EVENT_FRAMES))
    for number in _spread(np.arange(len(ranges)), _MAX_EPISODES):
        frames = ranges[number]
        chosen.update(_spread(np.arange(frames.start, frames.stop), _FRAMES_OF_AN_EPISODE))
        annotations = Annotations.of(demonstrations.frame(frames.start).annotations)
        for row in annotations.persistent:
            begun = round((row.timestamp_s or 0.0) * demonstrations.spec.control_rate_hz)
            chosen.add(min(frames.start + max(begun, 0), frames.stop - 1))
    for index in sorted(chosen):
        sample = demonstrations.frame(index)
        annotations = Annotations.of(sample.annotations)
        task = sample.task or task_variant(annotations, index)
        yield Frame(annotations=annotations, time_s=sample.timestamp_s, index=index, task=task)


def _spread(values: np.ndarray[Any, np.dtype[np.int64]], count: int) -> list[int]:
    """At most count of them, evenly."""
    if len(values) <= count:
        return [int(value) for value in values]
    return [int(values[place]) for place in np.linspace(0, len(values) - 1, count).astype(np.int64)]
