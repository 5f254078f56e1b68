"""What is said in each kind of prompt, before a policy writes it down: the same for all of them.

subtask      user task                                                                    -> the subtask
low level    user subtask                                                                 -> (actions)
memory       user task; previous memory, if any; the subtask just completed, if any      -> the new memory
interjection user task; previous plan, if any; user text                                  -> what to say
question     user question                                                                -> the answer
joint        user task; assistant subtask                                                 -> (actions)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput

from ..losses import IGNORED_LABEL
from ..policy import Sample, TextKind, TextRequest
from ..prompt import Prompt
from ..recipes.annotations import Annotations
from ..recipes.recipe import Recipe
from ..recipes.render import Message, Messages, PromptDropout, fallback, plain_text, predicts_actions, render, task_variant
from .tokenizer import Tokenizer

_NUM_STATE_BINS = 256
_STATE_EDGES = np.linspace(-1, 1, _NUM_STATE_BINS + 1)[:-1]
_SPOKEN = re.compile(r"<say>(.*?)</say>", re.DOTALL)


def training(sample: Sample, recipe: Recipe | None, dropout: PromptDropout, *, vary_task: bool) -> tuple[Messages, bool]:
    """Of a frame, as the recipe says, and whether it teaches actions.

    Where the recipe has nothing for the frame, it teaches acting on the task.

    Args:
        vary_task: Other wordings of the task, where the episode has some, take the task's place.

    Raises:
        InvalidInput: The recipe has nothing and there is no task: the frame cannot be trained on.
    """
    annotations = Annotations.of(sample.annotations)
    task = sample.task if sample.task.strip() else None
    if vary_task and task_variant(annotations, sample.index) is not None:
        task = None
    messages = None
    if recipe is not None:
        messages = render(recipe, annotations, time_s=sample.timestamp_s, index=sample.index, task=task)
    messages = messages or fallback(task or task_variant(annotations, sample.index))
    if messages is None:
        raise InvalidInput(
            f"sample {sample.index} has neither a task nor annotations that its recipe uses; leave it out", field="task"
        )
    return dropout.apply(messages, sample.index), predicts_actions(messages)


def acting(task: str) -> Messages:
    return (Message(role="user", content=task, stream="low_level"),)


def acting_jointly(task: str, subtask: str) -> Messages:
    """The subtask is given; it stands where training had it as a target."""
    return (
        Message(role="user", content=task, stream="low_level"),
        Message(role="assistant", content=subtask, stream="low_level", is_target=True),
    )


def asking(task: str, request: TextRequest) -> Messages:
    """Ends before the assistant's answer."""

    def user(text: str) -> Message:
        return Message(role="user", content=text)

    def assistant(text: str) -> Message:
        return Message(role="assistant", content=text)

    said, previous = request.user_text.strip(), request.previous_text.strip()
    if request.kind in (TextKind.INTERJECTION, TextKind.VISUAL_QUESTION) and not said:
        raise InvalidInput(f"is empty; {request.kind.value} needs what the user said", field="user_text")
    if request.kind is TextKind.VISUAL_QUESTION:
        return (user(said),)
    parts = [user(task)]
    if request.kind is TextKind.MEMORY:
        parts += [assistant(f"Previous memory: {previous}")] if previous else []
        parts += [user(f"Completed subtask: {said}")] if said else []
    elif request.kind is TextKind.INTERJECTION:
        parts += [assistant(f"Previous plan:\n{previous}")] if previous else []
        parts += [user(said)]
    return tuple(parts)


def spoken_text(message: Message, separator: str = "\n") -> str:
    """Its text, and what its say() calls speak as <say>...</say> on a line after it; other calls are left out.

    separator: Between blocks of text, where nothing is spoken.
    """
    spoken = "".join(f"<say>{text}</say>" for text in map(_said, message.tool_calls) if text)
    if not spoken:
        return plain_text(message.content, separator)
    written = plain_text(message.content).strip()
    return f"{written}\n{spoken}" if written else spoken


def shown(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """A prompt for people: special tokens as they are written, what is learnt between [[ and ]]."""
    tokens = prompt.tokens
    learnt = np.zeros(len(tokens), dtype=np.bool_) if prompt.labels is None else prompt.labels != IGNORED_LABEL
    edges = [0, *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), len(tokens)]
    parts = []
    for begin, end in itertools.pairwise(edges):
        text = tokenizer.decode(tokens[begin:end].tolist(), with_special=True)
        parts.append(f"[[{text}]]" if begin < end and learnt[begin] else text)
    return "".join(parts)


def parse_spoken(text: str) -> tuple[str, list[str]]:
    """Of generated text: what is written and what is spoken."""
    return _SPOKEN.sub("", text).strip(), [said.strip() for said in _SPOKEN.findall(text)]


def _said(call: Mapping[str, Any]) -> str | None:
    function = call.get("function")
    if not isinstance(function, Mapping) or function.get("name") != "say":
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    text = arguments.get("text") if isinstance(arguments, Mapping) else None
    return text if isinstance(text, str) else None


def state_bins(state: npt.NDArray[np.float32]) -> str:
    """Normalised numbers (S,) as bins of [-1, 1]: 0 to 255, -1 below, 255 above as well.

    Raises InvalidInput for a number that is not finite.
    """
    if not np.isfinite(state).all():
        raise InvalidInput(f"holds {state[~np.isfinite(state)][0]} at {int(np.argmin(np.isfinite(state)))}", field="state")
    return " ".join(map(str, (np.digitize(state, _STATE_EDGES) - 1).tolist()))
