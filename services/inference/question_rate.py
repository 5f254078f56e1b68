"""How often one robot asks a text head, and how long the answers are, as it was lately. Pure: the clock is an argument.

What a robot will ask is not known when it comes, so nobody is refused for it; what it asks counts while it asks.
"""

from __future__ import annotations

import math

from .capacity import TextDemand

# What was seen so long ago weighs 1/e: some questions of a robot that asks every few seconds, and soon forgotten.
FADE_S = 10.0
# One question weighs so little after three times FADE_S: what is asked less often takes nothing worth counting.
LEAST_WEIGHT = 0.05


class QuestionRate:
    """Fading counts of one robot's questions and of their answers' tokens. Times in seconds, never going back."""

    def __init__(self) -> None:
        self._questions = 0.0
        self._tokens = 0.0
        self._at_s = 0.0

    def asked(self, now_s: float) -> None:
        """A question went to the text head."""
        self._fade(now_s)
        self._questions += 1.0

    def heard(self, now_s: float) -> None:
        """A token of an answer came."""
        self._fade(now_s)
        self._tokens += 1.0

    def demand(self, now_s: float) -> TextDemand | None:
        """What the robot asks of the device; None for one that did not ask lately, or never.

        After the first question the rate is as of one every FADE_S; it takes a few to be what the robot keeps to.
        """
        self._fade(now_s)
        if self._questions < LEAST_WEIGHT:
            return None
        return TextDemand(questions_per_s=self._questions / FADE_S, tokens=self._tokens / self._questions)

    def _fade(self, now_s: float) -> None:
        faded = math.exp(-max(0.0, now_s - self._at_s) / FADE_S)
        self._questions *= faded
        self._tokens *= faded
        self._at_s = max(self._at_s, now_s)
