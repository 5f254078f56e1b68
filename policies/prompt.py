"""What the large policies want of whoever makes prompts: recipes and tokenizers, which they do not know themselves.

Shapes: l and f tokens, S state size, T horizon, R action size of the robot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .policy import Sample, TextRequest


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sample's tokens, not padded.

    Attributes:
        tokens: (l,) int64, at most the config's prompt_length.
        marks: (l,) bool, text that attends causally though it is no target: in joint mode, the given subtask; or None.
        labels: (l,) int64, losses.IGNORED_LABEL where nothing is learnt; None when acting or asking.
        predicts_actions: The flow and FAST terms count this sample.
        fast_tokens: (f,) int64 wrapped FAST sequence of the actions, or None.
        fast_is_code: (f,) bool, codes among them.
    """

    tokens: npt.NDArray[np.int64]
    marks: npt.NDArray[np.bool_] | None = None
    labels: npt.NDArray[np.int64] | None = None
    predicts_actions: bool = True
    fast_tokens: npt.NDArray[np.int64] | None = None
    fast_is_code: npt.NDArray[np.bool_] | None = None


class Prompter(Protocol):
    """Recipes, prompts and tokenizers, as a policy needs them. Numbers come normalised; all token ids are below num_ids."""

    eos_token: int
    special_tokens: Sequence[int]
    num_ids: int

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        """state (S,), actions (T, R)."""

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt: ...

    def asking(self, sample: Sample, request: TextRequest, state: npt.NDArray[np.float32]) -> Prompt: ...

    def text(self, tokens: Sequence[int]) -> str:
        """Special tokens left out."""

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer of this text, its end included."""

    def shown(self, prompt: Prompt) -> str:
        """For people: special tokens as they are written, what is learnt between [[ and ]]."""


class Pieces:
    """An answer's tokens as text, one by one. One may end inside a character; its text comes with what completes it."""

    # So many tokens are read again with each new one, at most: an answer's last token costs what its first ones do.
    WINDOW = 8

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        # The last ones, and their text: a token's text depends on the one before it (whether a space stands between).
        self._tokens: list[int] = []
        self._written = ""

    def add(self, token: int) -> str | None:
        """The text that this token adds, "" for a special one; None where it ends inside a character."""
        self._tokens.append(token)
        whole = self._prompter.text(self._tokens)
        if not whole.startswith(self._written) or whole.endswith("\ufffd"):
            return None
        new, self._written = whole[len(self._written) :], whole
        if len(self._tokens) >= self.WINDOW:
            self._forget(token)
        return new

    def _forget(self, token: int) -> None:
        """All but the last token, where it has a text of its own, which does not begin inside a character."""
        alone = self._prompter.text([token])
        if alone.strip() and "\ufffd" not in alone and self._written.endswith(alone):
            self._tokens, self._written = [token], alone
