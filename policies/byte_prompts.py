"""Prompts of plain bytes: a whole large policy for tests and demonstrations, without a tokenizer's files.

The forms are those of pi05 and pi052, or without the state, which SmolVLA takes as numbers. The text head learns the
subtask, or the task where a sample has none. Actions become one code a number. Nothing of this fits published weights.

Tokens: 0 padding, 1 end, 2 begin, 3 unknown, 4 to 259 bytes, 260 to 515 codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .losses import IGNORED_LABEL
from .policy import Sample, TextRequest
from .prompt import Prompt

END, BEGIN = 1, 2
FIRST_BYTE, FIRST_CODE = 4, 260
VOCABULARY = 516
MAX_CODES = 24


class BytePrompter:
    """See policies.prompt.Prompter. with_text: Training teaches text and codes. with_state: The prompt holds it."""

    eos_token = END
    special_tokens: Sequence[int] = (0, END, BEGIN, 3)
    num_ids = VOCABULARY

    def __init__(self, prompt_length: int, *, with_text: bool, with_state: bool = True) -> None:
        self._length = prompt_length
        self._with_state = with_state
        self._with_text = with_text

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        if not self._with_text:
            return self.acting(sample, state)
        question = self._tokens(f"User: {sample.task}{self._state(state)}\nAssistant:")
        subtask = (sample.annotations or {}).get("subtask") or sample.task
        answer = [*_bytes(f" {subtask}"), END]
        tokens = np.array([*question, *answer], dtype=np.int64)[: self._length]
        labels = np.where(np.arange(len(tokens)) < len(question), IGNORED_LABEL, tokens)
        codes = np.clip(np.rint((actions.astype(np.float64) + 1.0) * 127.5), 0, 255).astype(np.int64).reshape(-1)[:MAX_CODES]
        fast = np.array([BEGIN, *(FIRST_CODE + codes), END], dtype=np.int64)
        is_code = fast >= FIRST_CODE
        return Prompt(tokens=tokens, labels=labels, fast_tokens=fast, fast_is_code=is_code)

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt:
        form = "User: {}{}\n" if self._with_text else "Task: {}{}\nAction: "
        return Prompt(tokens=self._tokens(form.format(sample.task, self._state(state))))

    def asking(self, sample: Sample, request: TextRequest, state: npt.NDArray[np.float32]) -> Prompt:
        asked = f"{sample.task} {request.user_text}".strip()
        return Prompt(tokens=self._tokens(f"User: {asked}{self._state(state)}\nAssistant:"))

    def text(self, tokens: Sequence[int]) -> str:
        whole = bytes(token - FIRST_BYTE for token in tokens if FIRST_BYTE <= token < FIRST_CODE)
        return whole.decode("utf-8", errors="replace").lstrip()

    def answer(self, text: str) -> list[int]:
        return [*_bytes(f" {text}"), END]

    def shown(self, prompt: Prompt) -> str:
        return self.text(prompt.tokens.tolist())

    def _state(self, state: npt.NDArray[np.float32]) -> str:
        return f", State: {_bins(state)};" if self._with_state else ""

    def _tokens(self, text: str) -> npt.NDArray[np.int64]:
        """The end of a text that is too long: there stand the state and the question."""
        whole = _bytes(text)
        return np.array([BEGIN, *whole[max(0, len(whole) - self._length + 1) :]], dtype=np.int64)


def _bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def _bins(state: npt.NDArray[np.float32]) -> str:
    """256 bins over [-1, 1]; -1 below."""
    edges = np.linspace(-1.0, 1.0, 257)[:-1]
    return " ".join(str(int(index) - 1) for index in np.digitize(state, edges))
