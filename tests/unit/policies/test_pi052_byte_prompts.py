"""Prompts of bytes, the stand-in for a tokenizer."""

from __future__ import annotations

import numpy as np

from policies.byte_prompts import END, FIRST_BYTE, FIRST_CODE, VOCABULARY, BytePrompter
from policies.losses import IGNORED_LABEL
from policies.policy import Sample

STATE = np.array([-1.0, 0.0, 1.5, -2.0], dtype=np.float32)


def _written(tokens: np.ndarray) -> str:
    return bytes(int(token) - FIRST_BYTE for token in tokens if FIRST_BYTE <= token < FIRST_CODE).decode()


def test_task_and_state_are_written() -> None:
    prompt = BytePrompter(96, with_text=False).acting(Sample(observation={}, task="pick"), STATE)
    assert _written(prompt.tokens) == "Task: pick, State: 0 128 255 -1;\nAction: "


def test_a_long_task_loses_its_beginning() -> None:
    prompt = BytePrompter(20, with_text=True).acting(Sample(observation={}, task="x" * 99), STATE)
    assert len(prompt.tokens) == 20
    assert _written(prompt.tokens).endswith("0 128 255 -1;\n")


def test_the_subtask_and_the_end_are_learnt() -> None:
    prompter = BytePrompter(96, with_text=True)
    actions = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    prompt = prompter.training(Sample(observation={}, task="pick", annotations={"subtask": "grasp"}), STATE, actions)
    assert prompt.labels is not None
    learnt = prompt.labels[prompt.labels != IGNORED_LABEL]
    assert learnt[-1] == END
    assert prompter.text(learnt.tolist()) == "grasp"
    assert prompt.fast_tokens is not None
    assert prompt.fast_is_code is not None
    codes = prompt.fast_tokens[prompt.fast_is_code]
    assert (codes[0], codes[-1]) == (FIRST_CODE, VOCABULARY - 1)
    assert (np.diff(codes) > 0).all()
