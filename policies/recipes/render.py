"""A frame's annotations to messages, as a recipe says: the same on every rank and in every run."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.errors import InvalidInput

from .annotations import Annotations, Row
from .recipe import PLACEHOLDER, TASK, Component, Content, ImageBlock, Recipe, Stream, TextBlock


@dataclass(frozen=True, kw_only=True)
class Message:
    """Attributes:
    content: Text, blocks, or None where only tool calls are.
    is_target: The text is learnt.
    """

    role: str
    content: Content
    stream: Stream = "high_level"
    is_target: bool = False
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """{"role", "content" unless None, "tool_calls" if any}."""
        answer: dict[str, Any] = {"role": self.role}
        if isinstance(self.content, str):
            answer["content"] = self.content
        elif self.content is not None:
            answer["content"] = [
                {"type": "text", "text": block.text}
                if isinstance(block, TextBlock)
                else {"type": "image", "feature": block.feature}
                for block in self.content
            ]
        if self.tool_calls:
            answer["tool_calls"] = [dict(call) for call in self.tool_calls]
        return answer


Messages = tuple[Message, ...]


def predicts_actions(messages: Sequence[Message]) -> bool:
    """The sample teaches actions, and its prompt holds the state."""
    return any(message.stream == "low_level" for message in messages)


def render(recipe: Recipe, annotations: Annotations, *, time_s: float, index: int, task: str | None) -> Messages | None:
    """The messages of the frame, or None where they would teach nothing.

    Args:
        time_s: Of the frame in its episode.
        index: Of the frame in the data set; the draws depend on nothing else.
        task: The instruction; None takes one of the episode's task_aug rows.

    Raises:
        InvalidInput: A binding fits more than one row.
    """
    if task is None:
        task = task_variant(annotations, index)

    def rendered(component: Component) -> Messages | None:
        return _render_component(component, annotations, time_s, task)

    if len(recipe.components) == 1:
        return rendered(recipe.components[0])
    questions = [(c, rendered(c)) for c in recipe.components if c.is_visual_question]
    asked = [(c, messages) for c, messages in questions if messages is not None]
    if asked:
        return asked[_draw([c.weight for c, _ in asked], f"vqa:{index}")][1]
    return rendered(recipe.components[_draw([c.weight for c in recipe.components], str(index))])


def fallback(task: str | None) -> Messages | None:
    """What a frame teaches if its recipe has nothing for it: acting on the task. None without a task: leave it out."""
    return (Message(role="user", content=task, stream="low_level"),) if task else None


def _render_component(component: Component, annotations: Annotations, time_s: float, task: str | None) -> Messages | None:
    rows: dict[str, Row | None] = {
        name: binding.resolve(annotations, time_s) for name, binding in component.bindings.items()
    }
    texts = {name: (row.content or "") if row else "" for name, row in rows.items()} | {TASK: task or ""}
    present = {name for name, row in rows.items() if row is not None} | ({TASK} if task is not None else set())

    def filled(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: texts[match[1]], text)

    messages = []
    for turn in component.turns:
        if turn.if_present is not None and turn.if_present not in present:
            continue
        speaker = rows[turn.tool_calls_from] if turn.tool_calls_from is not None else None
        messages.append(
            Message(
                role=turn.role,
                content=_map_text(turn.content, filled),
                stream=turn.stream,
                is_target=turn.is_target,
                tool_calls=speaker.tool_calls if speaker is not None else (),
            )
        )
    if not any(message.is_target or message.stream == "low_level" for message in messages):
        return None
    return tuple(messages)


def _map_text(content: Content, change: Callable[[str], str]) -> Content:
    if content is None:
        return None
    if isinstance(content, str):
        return change(content)
    return tuple(block if isinstance(block, ImageBlock) else TextBlock(text=change(block.text)) for block in content)


def plain_text(content: Content, separator: str = "\n") -> str:
    """Text blocks joined; pictures enter a model by themselves."""
    if content is None or isinstance(content, str):
        return content or ""
    return separator.join(block.text for block in content if isinstance(block, TextBlock))


# -- draws -------------------------------------------------------------------------------------------------------------


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _draw(weights: Sequence[float], key: str) -> int:
    """Index of the weight that key falls on."""
    point = _number(key) / 2**64 * sum(weights)
    reached = 0.0
    for index, weight in enumerate(weights):
        reached += weight
        if point < reached:
            return index
    return len(weights) - 1


def task_variant(annotations: Annotations, index: int) -> str | None:
    """One of the episode's other wordings of its task, by the frame; None if it has none."""
    variants = [row for row in annotations.persistent if row.style == "task_aug" and row.role == "user"]
    return variants[_number(f"task_aug:{index}") % len(variants)].content if variants else None


# -- leaving parts of a prompt out ---------------------------------------------------------------------------------------

_OPENINGS = {
    "plan": ("Plan:", "Previous plan"),
    "memory": ("Memory:", "Previous memory"),
    "subtask": ("Current subtask", "Completed subtask"),
}


@dataclass(frozen=True, kw_only=True)
class PromptDropout:
    """How often training leaves plan, memory or subtask out of what is given, so that a model does not lean on them.

    Attributes:
        as_smolvla2: Openings by which such messages are known count in any case, and one that cannot go still takes a draw.
    """

    plan: float = 0.0
    memory: float = 0.0
    subtask: float = 0.0
    as_smolvla2: bool = False

    def __post_init__(self) -> None:
        for name in _OPENINGS:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidInput(f"is {getattr(self, name)}, must be between 0 and 1", field=f"{name}_dropout_prob")

    def apply(self, messages: Messages, seed: int) -> Messages:
        """What is left; targets always are."""
        generator = random.Random(seed)
        kept = []
        for message in messages:
            probability = None if message.is_target else self._probability(plain_text(message.content).lstrip())
            # What takes a draw decides about the messages after it, so it is part of the contract.
            draws = probability is not None and (probability > 0.0 or (self.as_smolvla2 and self._is_on))
            if probability is None or not draws or generator.random() >= probability:
                kept.append(message)
        return tuple(kept)

    @property
    def _is_on(self) -> bool:
        return max(self.plan, self.memory, self.subtask) > 0.0

    def _probability(self, text: str) -> float | None:
        """None for a message of no kind, which stays."""
        for name, openings in _OPENINGS.items():
            if any(self._opens(text, opening) for opening in openings):
                return float(getattr(self, name))
        return None

    def _opens(self, text: str, opening: str) -> bool:
        return text.lower().startswith(opening.lower()) if self.as_smolvla2 else text.startswith(opening)


# -- does a recipe fit its data? ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What render() needs of one."""

    annotations: Annotations
    time_s: float
    index: int
    task: str | None


def survey(recipe: Recipe, frames: Iterable[Frame]) -> Counter[str]:
    """How many frames each component has messages for; "" counts all frames.

    Raises:
        InvalidInput: A component never has any: with its data, the recipe does not teach what it says. Names it.
    """
    counts: Counter[str] = Counter()
    for frame in frames:
        counts[""] += 1
        task = frame.task if frame.task is not None else task_variant(frame.annotations, frame.index)
        for component in recipe.components:
            if _render_component(component, frame.annotations, frame.time_s, task) is not None:
                counts[component.name] += 1
    for component in recipe.components:
        if counts[""] and not counts[component.name]:
            names = ", ".join(str(binding) for binding in component.bindings.values())
            raise InvalidInput(
                f"recipe {recipe.name}: component {component.name!r} has messages for none of {counts['']} frames; "
                f"it needs {names or 'a task'}. Annotate the data or take another recipe",
                field="recipe",
            )
    return counts
