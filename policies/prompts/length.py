"""What becomes of a prompt that is longer than the model takes."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int64]


class LengthLimit:
    """In training a prompt is cut, as the reference does, which is said once. What acts must not lose its end: there stands
    the state, or the question.
    """

    def __init__(self, prompt_length: int) -> None:
        self._limit = prompt_length
        self._has_cut = False

    def cut(self, tokens: Tokens) -> Tokens:
        if len(tokens) > self._limit and not self._has_cut:
            self._has_cut = True
            logger.warning("a prompt of %d tokens is cut to prompt_length, %d; so will be others", len(tokens), self._limit)
        return tokens[: self._limit]

    def checked(self, tokens: Tokens) -> Tokens:
        if len(tokens) > self._limit:
            raise InvalidInput(
                f"makes a prompt of {len(tokens)} tokens, the limit is {self._limit}; shorten it", field="task"
            )
        return tokens
