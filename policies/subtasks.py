"""Acting in two levels: the text head says what to do next, and actions follow what it said.

    hierarchical   the subtask takes the task's place in the acting prompt
    joint          the acting prompt holds both (policies/prompts: joint)

A policy keeps no state, so whoever acts carries a Subtask for each robot and renews it every few chunks. An answer that is
no instruction does not replace one that is: an arm must not follow noise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from manyhands.errors import InvalidInput

from .policy import Sample, TextKind, TextRequest
from .prompts.pi052 import SUBTASK

MAX_CHARACTERS = 256
# The same word or phrase, so often in a row, is a decoder that does not find its end.
_REPEATED = re.compile(r"(?:^|\s)(\S+(?:\s+\S+){0,3}?)(?:\s+\1){3,}(?=\s|$)")
_TOKEN = re.compile(r"<[^<>\s]*>")


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """What a robot does now.

    Attributes:
        text: The last answer that was an instruction; "" before the first: then the task itself is acted on.
        age_chunks: Chunks made since the text head was asked.
        num_refused: Answers that were no instruction, over the robot's session.
    """

    text: str = ""
    age_chunks: int = 0
    num_refused: int = 0

    def is_due(self, hold_chunks: int) -> bool:
        """Whether the text head is to be asked before the next chunk."""
        return not self.text or self.age_chunks >= hold_chunks

    def acted(self) -> Subtask:
        """After a chunk."""
        return dataclasses.replace(self, age_chunks=self.age_chunks + 1)

    def answered(self, answer: str) -> Subtask:
        """With the text head's answer, or as it was, but for the count, where that is no instruction."""
        text = instruction(answer)
        if text is None:
            return Subtask(text=self.text, num_refused=self.num_refused + 1)
        return Subtask(text=text, num_refused=self.num_refused)


def hold_chunks(replan_steps: int, executed_steps: int) -> int:
    """For how many chunks a subtask holds that is to be renewed every replan_steps of control, executed_steps a chunk.

    At least one; halves go to the even neighbour.
    """
    if replan_steps < 0 or executed_steps < 1:
        raise InvalidInput(f"is {replan_steps} with {executed_steps} steps a chunk; must be >= 0", field="replan_steps")
    return max(1, round(replan_steps / executed_steps))


def instruction(answer: str) -> str | None:
    """The answer on one line; None where it cannot be an instruction: nothing, no letter, special tokens or broken
    characters, longer than MAX_CHARACTERS, or the same words four times over."""
    text = " ".join(answer.split())
    if not any(character.isalpha() for character in text) or len(text) > MAX_CHARACTERS:
        return None
    if "\ufffd" in text or not text.isprintable() or _TOKEN.search(text) or _REPEATED.search(text):
        return None
    return text


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
