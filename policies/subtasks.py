"""Acting in two levels: the text head says what to do next, and actions follow what it said.

    hierarchical   the subtask takes the task's place in the acting prompt
    joint          the acting prompt holds both (policies/prompts: joint)

What is in force, and what is no instruction, is manyhands.subtasks' to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from manyhands.subtasks import Subtask

from .policy import Sample, TextKind, TextRequest
from .prompts.pi052 import SUBTASK


def conditioned(sample: Sample, subtask: Subtask, *, joint: bool) -> Sample:
    """The sample to act on."""
    if not subtask.text:
        return sample
    if joint:
        return dataclasses.replace(sample, annotations={**(sample.annotations or {}), SUBTASK: subtask.text})
    return dataclasses.replace(sample, task=subtask.text)


def renewed(
    subtask: Subtask,
    sample: Sample,
    ask: Callable[[Sample, TextRequest], str],
    *,
    hold_chunks: int,
    max_new_tokens: int = 0,
) -> Subtask:
    """Asks the text head about the task where that is due.

    Args:
        sample: With the task, not a subtask.
        ask: The text head's answer to a request.
    """
    if not subtask.is_due(hold_chunks):
        return subtask
    request = TextRequest(kind=TextKind.SUBTASK, previous_text=subtask.text, max_new_tokens=max_new_tokens)
    return subtask.answered(ask(sample, request))
