"""pi052's and pi05's prompts for PaliGemma's tokenizer.

pi052 writes a message as a line, and what is learnt ends with <eos>:

    User: put the cube in the bin, State: 12 240 131;
    Assistant: grasp the cube<eos>

pi05 has one form: "Task: put the cube in the bin, State: 12 240 131;", a line end, "Action: ".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as RawTokenizer

from manyhands.errors import InvalidInput, NotOffered

from ..fast import FastTokenizer
from ..losses import IGNORED_LABEL
from ..policy import Sample, TextKind, TextRequest
from ..prompt import Prompt
from ..recipes.recipe import Recipe
from ..recipes.render import Message, Messages, PromptDropout
from ..samples import check_text
from . import messages as conversations
from .length import LengthLimit
from .locations import LOCATION_TOKENS, from_json
from .messages import spoken_text, state_bins
from .tokenizer import Tokenizer

BOS, EOS = "<bos>", "<eos>"
_SPECIAL = ("<pad>", EOS, BOS, "<unk>")
# The key of Sample.annotations under which joint mode finds the subtask in force.
SUBTASK = "subtask"
# No space: it belongs to the first token of the answer.
_GENERATION_HEADER = "Assistant:"


def paligemma(source: Path | RawTokenizer) -> Tokenizer:
    """PaliGemma's tokenizer with every location one token; a folder with tokenizer.json, or one already read."""
    if isinstance(source, Path):
        return Tokenizer.load(source, LOCATION_TOKENS)
    return Tokenizer(source, LOCATION_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Pi052PromptOptions:
    """Attributes:
    recipe: What annotations become; None: every sample acts on its task.
    prompt_length: Tokens of a prompt. A longer one is cut in training, as the reference does, and refused when acting.
    max_action_tokens: Of the wrapped FAST sequence; a longer one is an error.
    fast_skip_tokens: FAST codes lie so far below the end of the vocabulary.
    dropout: In training.
    vary_task: In training: see messages.training().
    joint: Acting prompts hold task and subtask, and subtasks are asked for with the state in sight.
    learns_fast: Training prompts without FAST tokens are an error.
    """

    recipe: Recipe | None = None
    prompt_length: int = 200
    max_action_tokens: int = 256
    fast_skip_tokens: int = 1152
    dropout: PromptDropout = field(default_factory=PromptDropout)
    vary_task: bool = False
    joint: bool = False
    learns_fast: bool = False


class Pi052Prompter:
    """Attributes:
    eos_token: Ends an answer.
    special_tokens: Never part of an answer's text.
    """

    def __init__(self, tokenizer: Tokenizer, options: Pi052PromptOptions, fast: FastTokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._fast = fast
        self.num_ids = tokenizer.num_ids
        self._bos = tokenizer.id_of(BOS)
        self.eos_token = tokenizer.id_of(EOS)
        self.special_tokens: Sequence[int] = tuple(tokenizer.id_of(token) for token in _SPECIAL)
        lowest = tokenizer.vocabulary - options.fast_skip_tokens - (fast.config.vocab_size if fast else 0)
        if lowest <= 0:
            raise InvalidInput(f"leaves no room for FAST codes in {tokenizer.vocabulary} tokens", field="fast_skip_tokens")
        self._length = LengthLimit(options.prompt_length)

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        """state (S,) and actions (T, R), both normalised."""
        options = self._options
        messages, predicts = conversations.training(sample, options.recipe, options.dropout, vary_task=options.vary_task)
        tokens, is_target = self.write(messages, state if predicts else None)
        tokens, is_target = self._length.cut(tokens), is_target[: options.prompt_length]
        fast_tokens = fast_is_code = None
        if self._fast is not None:
            fast_tokens, fast_is_code = self.wrap_codes(self._fast.encode(actions))
        elif options.learns_fast:
            raise NotOffered(
                "fast_weight is over 0, and the policy has no FAST tokenizer; fit one on the data, or set fast_weight to 0",
                field="action_tokenizer",
            )
        return Prompt(
            tokens=tokens,
            labels=np.where(is_target, tokens, IGNORED_LABEL),
            predicts_actions=predicts,
            fast_tokens=fast_tokens,
            fast_is_code=fast_is_code,
        )

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt:
        subtask = (sample.annotations or {}).get(SUBTASK) if self._options.joint else None
        if subtask is None or not check_text(subtask, f"annotations.{SUBTASK}").strip():
            tokens, _ = self.write(conversations.acting(sample.task), state)
            return Prompt(tokens=self._length.checked(tokens))
        tokens, marks = self.write(conversations.acting_jointly(sample.task, subtask), state)
        return Prompt(tokens=self._length.checked(tokens), marks=marks)

    def asking(self, sample: Sample, request: TextRequest, state: npt.NDArray[np.float32]) -> Prompt:
        sees_state = self._options.joint and request.kind is TextKind.SUBTASK
        tokens, _ = self.write(conversations.asking(sample.task, request), state if sees_state else None, ask=True)
        return Prompt(tokens=self._length.checked(tokens))

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens).lstrip()

    def answer(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(f" {text}").ids, self.eos_token]

    def shown(self, prompt: Prompt) -> str:
        return conversations.shown(prompt, self._tokenizer)

    def write(
        self, messages: Messages, state: npt.NDArray[np.float32] | None, *, ask: bool = False
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens (l,), and True (l,) on those of targets, their <eos> included; at any length.

        Args:
            state: (S,) normalised, for the last user message; None leaves it out.
            ask: Ends with the header of an answer.
        """
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        text = ""
        spans = []
        for index, message in enumerate(messages):
            content = self._content(message)
            if state is not None and index == last_user:
                content = f"{content}, State: {state_bins(state)};"
            text += f"{message.role.capitalize()}: "
            if message.is_target:
                content += EOS
                spans.append((len(text), len(text) + len(content)))
            text += f"{content}\n"
        encoded = self._tokenizer.encode(text + (_GENERATION_HEADER if ask else ""))
        tokens = np.array([self._bos, *encoded.ids], dtype=np.int64)
        is_target = np.zeros(len(tokens), dtype=np.bool_)
        if spans:  # What acts has none, and needs no offsets.
            begin, end = encoded.offsets.T
            for first, behind in spans:
                is_target[1:] |= (begin < behind) & (end > first) & (end > begin)
        return tokens, is_target

    def wrap_codes(self, codes: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """FAST codes as the language tower reads them: tokens (f,), and True (f,) on codes."""
        encode = self._tokenizer.encode
        last = self._tokenizer.vocabulary - 1 - self._options.fast_skip_tokens
        before = np.concatenate([[self._bos], encode("Action: ").tokens])
        after = np.concatenate([encode("|").tokens, [self.eos_token]])
        tokens = np.concatenate([before, last - np.asarray(codes, dtype=np.int64), after])
        if len(tokens) > self._options.max_action_tokens:
            raise InvalidInput(
                f"a chunk takes {len(tokens)} FAST tokens, max_action_tokens is {self._options.max_action_tokens}; "
                "raise it or fit the FAST tokenizer on this data set",
                field="actions",
            )
        is_code = np.zeros(len(tokens), dtype=np.bool_)
        is_code[len(before) : len(tokens) - len(after)] = True
        return tokens, is_code

    def _content(self, message: Message) -> str:
        located = from_json(message.content) if message.is_target and isinstance(message.content, str) else None
        return spoken_text(message if located is None else replace(message, content=located))


class Pi05Prompter(Pi052Prompter):
    """One form for everything; it has no text to ask for."""

    def training(self, sample: Sample, state: npt.NDArray[np.float32], actions: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.cut(self._tokens(sample, state)))

    def acting(self, sample: Sample, state: npt.NDArray[np.float32]) -> Prompt:
        return Prompt(tokens=self._length.checked(self._tokens(sample, state)))

    def _tokens(self, sample: Sample, state: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        task = sample.task.strip().replace("_", " ").replace("\n", " ")
        text = f"Task: {task}, State: {state_bins(state)};\nAction: "
        return np.array([self._bos, *self._tokenizer.encode(text).ids], dtype=np.int64)
