"""What is no instruction never reaches the robot; the last good one stays in force."""

from __future__ import annotations

import pytest

from manyhands import subtasks
from manyhands.errors import InvalidInput
from manyhands.subtasks import Subtask


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("grasp the cup", "grasp the cup"),
        ("  grasp\n the\tcup ", "grasp the cup"),
        ("put the 2nd cup on 3", "put the 2nd cup on 3"),
        ("greif die Tasse", "greif die Tasse"),
        ("open open the lid", "open open the lid"),
    ],
)
def test_an_instruction_stands_on_one_line(answer, text):
    assert subtasks.instruction(answer) == text


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "...",
        "12 34",
        "the the the the cup",
        "go on go on go on go on",
        "a\ufffdb",
        "lid <loc0100>",
        "\x00grasp",
        "x" * 257,
    ],
)
def test_noise_is_no_instruction(answer):
    assert subtasks.instruction(answer) is None


def test_noise_keeps_the_last_good_one_and_is_counted():
    first = Subtask().answered("grasp the cup")
    kept = first.acted().answered("the the the the").answered("")
    assert (kept.text, kept.num_refused) == ("grasp the cup", 2)
    assert kept.answered("lift it") == Subtask(text="lift it", num_refused=2)


@pytest.mark.parametrize(
    ("replan", "executed", "chunks"), [(0, 50, 1), (50, 50, 1), (100, 50, 2), (120, 50, 2), (25, 10, 2), (1, 50, 1)]
)
def test_how_long_a_subtask_holds(replan, executed, chunks):
    assert subtasks.hold_chunks(replan, executed) == chunks


def test_impossible_holds_are_refused():
    with pytest.raises(InvalidInput, match="replan_steps"):
        subtasks.hold_chunks(-1, 10)
