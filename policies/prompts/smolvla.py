"""SmolVLA's and SmolVLA2's prompts for SmolVLM's tokenizer. The state is a token of its own and never in the text.

SmolVLA reads the task and a line end. SmolVLA2 writes SmolVLM's chat format:

    <|im_start|>User: put the cube in the bin<end_of_utterance>
    Assistant: grasp the cube<end_of_utterance>
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..losses import IGNORED_LABEL
from ..policy import Sample, TextRequest
from ..prompt import Prompt
from ..recipes.recipe import Recipe
from ..recipes.render import Messages, PromptDropout
from . import messages as conversations
from .length import LengthLimit
from .messages import spoken_text
from .tokenizer import Tokenizer

START, END_OF_UTTERANCE, PAD = "<|im_start|>", "<end_of_utterance>", "<|im_end|>"
_SPECIAL = ("<|endoftext|>", START, PAD, "<global-img>", "<fake_token_around_image>", "<image>", END_OF_UTTERANCE)
_GENERATION_HEADER = "Assistant:"


@dataclass(frozen=True, kw_only=True)
class SmolVLA2PromptOptions:
    """Attributes:
    recipe: What annotations become; None: every sample acts on its task.
    prompt_length: Tokens of a prompt. A longer one is cut in training, as the reference does, and refused when acting.
    dropout: In training; its as_smolvla2 should be True.
    vary_task: In training: see messages.training().
    """

    recipe: Recipe | None = None
    prompt_length: int = 48
    dropout: PromptDropout = field(default_factory=functools.partial(PromptDropout, as_smolvla2=True))
    vary_task: bool = False


class SmolVLA2Prompter:
    """As Pi052Prompter; answers about pictures stay JSON."""

    def __init__(self, tokenizer: Tokenizer, options: SmolVLA2PromptOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._length = LengthLimit(options.prompt_length)
        self.num_ids = tokenizer.num_ids
        self.eos_token = tokenizer.id_of(END_OF_UTTERANCE)
        self.pad_token = tokenizer.id_of(PAD)
        self.special_tokens: Sequence[int] = tuple(tokenizer.id_of(token) for token in _SPECIAL)

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        options = self._options
        messages, predicts = conversations.training(sample, options.recipe, options.dropout, vary_task=options.vary_task)
        tokens, is_target = self.write(messages)
        tokens, is_target = self._length.cut(tokens), is_target[: options.prompt_length]
        return Prompt(
            tokens=tokens,
            labels=np.where(is_target, tokens, IGNORED_LABEL),
            predicts_actions=predicts,
        )

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.checked(self.write(conversations.acting(sample.task))[0]))

    def asking(self, sample: Sample, request: TextRequest, state: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.checked(self.write(conversations.asking(sample.task, request), ask=True)[0]))

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens).lstrip()

    def answer(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(f" {text}").ids, self.eos_token]

    def shown(self, prompt: Prompt) -> str:
        return conversations.shown(prompt, self._tokenizer)

    def write(self, messages: Messages, *, ask: bool = False) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens (l,), and True (l,) on those of targets: their role and end of utterance are learnt too; at any length."""
        tokens = self._tokenizer.encode(_chat(messages) + (_GENERATION_HEADER if ask else "")).tokens
        is_target = np.zeros(len(tokens), dtype=np.bool_)
        for index, message in enumerate(messages):
            if message.is_target:
                first, behind = (len(self._tokenizer.encode(_chat(messages[:n])).ids) for n in (index, index + 1))
                is_target[first:behind] = True
        return tokens, is_target


class SmolVLAPrompter(SmolVLA2Prompter):
    """The task alone; it has no text to ask for."""

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.cut(self._tokens(sample)))

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.checked(self._tokens(sample)))

    def _tokens(self, sample: Sample) -> npt.NDArray[np.int64]:
        text = sample.task if sample.task.endswith("\n") else f"{sample.task}\n"
        return self._tokenizer.encode(text).tokens


def _chat(messages: Messages) -> str:
    """SmolVLM2's chat format with text alone, blocks one right after the other: pictures enter by themselves."""
    return START + "".join(f"{m.role.capitalize()}: {spoken_text(m, '')}{END_OF_UTTERANCE}\n" for m in messages)
