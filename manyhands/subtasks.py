"""What a robot does now, in words: which answers of a text head are instructions, and which one is in force.

An answer that is no instruction does not replace one that is: an arm must not follow noise. A policy and a service keep no
state, so whoever acts carries a Subtask for each robot.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from .errors import InvalidInput

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
