"""Which subtask a robot acts on, and when the text head is asked for the next one. Pure: no clock, no network.

A chunk never waits for text: until the first instruction has come the task itself is acted on, and later the last good one.
"""

from __future__ import annotations

from dataclasses import replace

from manyhands.subtasks import Subtask


class SubtaskRefresh:
    """The subtask of one run's robot; written by the control loop, read by anyone.

    Args:
        every_chunks: Asks again after so many chunks; 0: never asks, and the task is acted on.

    Attributes:
        subtask: In force. Its age counts chunks since the text head was last asked.
        num_taken: Instructions of the run that were taken.
    """

    def __init__(self, every_chunks: int) -> None:
        self._every_chunks = every_chunks
        self._is_due = True
        self.subtask = Subtask()
        self.num_taken = 0

    def begin_episode(self) -> None:
        """What was to be done in the last one says nothing of this one."""
        self.subtask = Subtask(num_refused=self.subtask.num_refused)
        self._is_due = True

    def acting_on(self, task: str) -> str:
        """What the next chunk is asked for."""
        return self.subtask.text or task

    def question_for(self, task: str) -> str:
        """The task, where the next request is to ask about it; else ""."""
        if self._every_chunks == 0:
            return ""
        return task if self._is_due or self.subtask.age_chunks >= self._every_chunks else ""

    def asked(self) -> None:
        """A request is on its way that asks."""
        self._is_due = False
        self.subtask = replace(self.subtask, age_chunks=0)

    def chunk_came(self) -> None:
        self.subtask = self.subtask.acted()

    def lost(self) -> None:
        """No answer will come to what was asked, or none that is worth having: the next request asks again."""
        self._is_due = True

    def answered(self, text: str, *, accepted: bool) -> None:
        """What the text head said. The service has judged it, and so does the robot's side."""
        answered = self.subtask.answered(text if accepted else "")
        self.num_taken += answered.num_refused == self.subtask.num_refused
        self.subtask = replace(answered, age_chunks=self.subtask.age_chunks)
