from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from manyhands.errors import InvalidInput
from policies.recipes import recipe as recipes
from policies.recipes.annotations import Annotations, parse_binding
from policies.recipes.render import Frame, Message, PromptDropout, fallback, predicts_actions, render, survey

SAY = {"type": "function", "function": {"name": "say", "arguments": {"text": "ok"}}}


def row(content, style, timestamp=None, role="assistant", **more):
    return {"role": role, "content": content, "style": style, "timestamp": timestamp, **more}


SUBTASKS = [row("reach", "subtask", 0.0), row("grasp", "subtask", 2.0), row("lift", "subtask", 3.5)]


def annotations(persistent=(), events=()):
    return Annotations.of({"persistent": persistent, "events": events})


def resolved(text, time_s, persistent=SUBTASKS, events=()):
    found = parse_binding(text).resolve(annotations(persistent, events), time_s)
    return found and found.content


@pytest.mark.parametrize(
    ("text", "time_s", "expected"),
    [
        ("active_at(t, style=subtask)", -0.1, None),
        ("active_at(t, style=subtask)", 2.0, "grasp"),
        ("active_at(t, style=subtask)", 9.0, "lift"),
        ("active_at(t, style=plan)", 9.0, None),
        ("emitted_at(t, style=subtask)", 2.05, "grasp"),
        ("emitted_at(t, style=subtask)", 1.95, "grasp"),
        ("emitted_at(t, style=subtask)", 2.2, None),
        ("nth_prev(style=subtask, offset=1)", 2.5, "reach"),
        ("nth_prev(style=subtask, offset=2)", 2.5, None),
        ("nth_prev(style=subtask, offset=1)", -1.0, None),
        ("nth_next(style=subtask, offset=1)", 2.5, "lift"),
        ("nth_next(style=subtask, offset=1)", -1.0, "reach"),
        ("nth_next(style=subtask, offset=3)", -1.0, "lift"),
        ("nth_next(style=subtask, offset=1)", 3.5, None),
    ],
)
def test_resolvers(text, time_s, expected):
    assert resolved(text, time_s) == expected


def test_events_are_found_on_their_frame_by_what_they_say_and_show():
    events = [
        row("where?", "vqa", role="user", camera="front"),
        row("there", "vqa", camera="front"),
        row("here", "vqa", camera="wrist"),
        row("sure", None, tool_calls=[SAY]),
    ]
    assert resolved("emitted_at(t, style=vqa, role=user)", 1.0, events=events) == "where?"
    assert resolved("emitted_at(t, style=vqa, role=assistant, camera=wrist)", 1.0, events=events) == "here"
    assert resolved("emitted_at(t, role=assistant, tool_name=say)", 1.0, events=events) == "sure"
    assert resolved("emitted_at(t, role=assistant, tool_name=wave)", 1.0, events=events) is None
    with pytest.raises(InvalidInput, match="fits 2 rows"):
        resolved("emitted_at(t, style=vqa, role=assistant)", 1.0, events=events)


def test_a_row_begins_on_its_frame_whatever_the_precision_of_its_time():
    frame_s = 7 / 30
    assert float(np.float32(frame_s)) != frame_s
    for stored in (frame_s, np.float32(frame_s)):
        assert resolved("active_at(t, style=subtask)", frame_s, [row("now", "subtask", stored)]) == "now"
        assert resolved("active_at(t, style=subtask)", float(np.float32(frame_s)), [row("now", "subtask", stored)]) == "now"


def test_rows_as_parquet_readers_give_them():
    calls = np.array(['{"function": {"name": "say"}}'], dtype=object)
    rows = np.array([row("a", "subtask", np.float32(0.5)), row(None, "memory", 1, tool_calls=calls)], dtype=object)
    found = Annotations.of({"persistent": rows, "events": None})
    assert [r.timestamp_s for r in found.persistent] == [0.5, 1.0]
    assert found.persistent[1].calls("say")
    assert Annotations.of(None) == Annotations()


@pytest.mark.parametrize(
    ("persistent", "events", "says"),
    [
        ([row("a", "subtask", None)], [], r"annotations.persistent\[0\].*timestamp is None"),
        ([row("a", "subtask", float("nan"))], [], "timestamp is nan"),
        ([row("a", "vqa", 1.0, camera="front")], [], "cannot be persistent"),
        ([row("a", "subtask", 1.0, camera="front")], [], "must not have a camera"),
        ([row("a", "subtask", 1.0, role="robot")], [], "role is 'robot'"),
        ([], [row("a", "subtask")], "cannot be an event"),
        ([], [row("a", "vqa")], r"annotations.events\[0\].*needs a camera"),
        ([], [row("a", None, tool_calls=["{"])], "tool call that is no object"),
    ],
)
def test_rows_that_cannot_be(persistent, events, says):
    with pytest.raises(InvalidInput, match=says):
        annotations(persistent, events)


def component(weight, content, **more):
    return {"weight": weight, "messages": [{"role": "user", "content": content, "stream": "low_level", **more}]}


def test_the_draw_follows_the_weights_and_the_index_alone():
    recipe = recipes.parse({"blend": {"a": component(1, "a"), "b": component(3, "b")}}, name="x")
    drawn = [render(recipe, annotations(), time_s=0.0, index=i, task="t")[0].content for i in range(4000)]
    assert Counter(drawn)["b"] == pytest.approx(3000, abs=100)
    assert drawn == [render(recipe, annotations(SUBTASKS), time_s=1.0, index=i, task="u")[0].content for i in range(4000)]


def test_questions_come_first_wherever_they_stand():
    question = {**component(0.001, "${vqa_query}", if_present="vqa_query"), "route": "vqa"}
    recipe = recipes.parse({"blend": {"act": component(1.0, "${task}"), "look": question}}, name="x")
    asked = annotations(events=[row("where?", "vqa", role="user", camera="front")])
    assert {render(recipe, asked, time_s=0.0, index=i, task="t")[0].content for i in range(50)} == {"where?"}
    assert {render(recipe, annotations(), time_s=0.0, index=i, task="t")[0].content for i in range(50)} == {"t"}


def test_several_questions_share_by_weight():
    def question(weight, camera):
        bound = {"q": f"emitted_at(t, style=vqa, camera={camera})"}
        return {**component(weight, "${q}", if_present="q"), "route": "vqa", "bindings": bound}

    value = {"blend": {"act": component(9.0, "t"), "one": question(1, "front"), "two": question(3, "wrist")}}
    recipe = recipes.parse(value, name="x")
    events = [row("front?", "vqa", role="user", camera="front"), row("wrist?", "vqa", role="user", camera="wrist")]
    drawn = Counter(
        render(recipe, annotations(events=events), time_s=0.0, index=i, task="t")[0].content for i in range(2000)
    )
    assert drawn["wrist?"] == pytest.approx(1500, abs=80)
    assert drawn["front?"] == pytest.approx(500, abs=80)


def test_speech_carries_its_tool_call():
    turn = {"role": "assistant", "stream": "high_level", "target": True, "if_present": "speech", "tool_calls_from": "speech"}
    recipe = recipes.parse({"messages": [turn]}, name="x")
    messages = render(recipe, annotations(events=[row(None, None, tool_calls=[SAY])]), time_s=0.0, index=0, task="t")
    assert messages[0].to_json() == {"role": "assistant", "tool_calls": [SAY]}
    assert render(recipe, annotations(), time_s=0.0, index=0, task="t") is None


def test_other_wordings_take_turns_only_without_a_task():
    recipe = recipes.parse({"messages": [{"role": "user", "content": "${task}", "stream": "low_level"}]}, name="x")
    worded = annotations([row(f"wording {i}", "task_aug", 0.0, role="user") for i in range(3)])
    drawn = Counter(render(recipe, worded, time_s=0.0, index=i, task=None)[0].content for i in range(600))
    assert sorted(drawn) == ["wording 0", "wording 1", "wording 2"]
    assert min(drawn.values()) > 150
    assert render(recipe, worded, time_s=0.0, index=0, task="mine")[0].content == "mine"


def test_fallback_acts_on_the_task():
    messages = fallback("tidy up")
    assert messages[0].content == "tidy up"
    assert predicts_actions(messages)
    assert not messages[0].is_target
    assert fallback("") is None
    assert fallback(None) is None


MEMORY = (
    Message(role="user", content="task"),
    Message(role="assistant", content="Previous memory: a"),
    Message(role="user", content="Completed subtask: b"),
    Message(role="assistant", content="Memory: target", is_target=True),
)


def test_dropout_takes_only_its_own_and_never_a_target():
    assert PromptDropout(memory=1.0).apply(MEMORY, 0) == (MEMORY[0], MEMORY[2], MEMORY[3])
    assert PromptDropout(subtask=1.0).apply(MEMORY, 0) == (MEMORY[0], MEMORY[1], MEMORY[3])
    assert PromptDropout(plan=1.0).apply(MEMORY, 0) == MEMORY


def test_dropout_is_a_function_of_the_sample():
    dropout = PromptDropout(memory=0.3)
    kept = [len(dropout.apply(MEMORY, seed)) for seed in range(1000)]
    assert kept == [len(dropout.apply(MEMORY, seed)) for seed in range(1000)]
    assert kept.count(3) == pytest.approx(300, abs=50)


def test_case_counts_unless_told():
    message = (Message(role="user", content=" previous MEMORY: a"),)
    assert PromptDropout(memory=1.0).apply(message, 0) == message
    assert PromptDropout(memory=1.0, as_smolvla2=True).apply(message, 0) == ()
    same_case = (Message(role="user", content=" Previous memory: a"),)
    assert PromptDropout(memory=1.0).apply(same_case, 0) == ()


def test_which_messages_take_a_draw():
    """Seed 0 draws 0.84, then 0.76: 0.8 separates them."""
    messages = (MEMORY[0], Message(role="assistant", content="Plan: c"), MEMORY[1])
    assert PromptDropout(memory=0.8).apply(messages, 0) == messages  # The memory takes the first.
    assert PromptDropout(memory=0.8, as_smolvla2=True).apply(messages, 0) == messages[:2]  # The plan did.
    of_subtask = (MEMORY[0], MEMORY[3], MEMORY[2])
    assert PromptDropout(subtask=0.8).apply(of_subtask, 0) == of_subtask  # Neither the task nor the target draws.


def test_probabilities_are_checked():
    with pytest.raises(InvalidInput, match="memory_dropout_prob"):
        PromptDropout(memory=1.5)


def test_a_blend_that_never_renders_is_found_before_training():
    recipe = recipes.load("subtask_mem")
    bare = [Frame(annotations=annotations(SUBTASKS), time_s=float(i), index=i, task="t") for i in range(5)]
    with pytest.raises(InvalidInput, match=r"component 'memory_update' has messages for none of 5 frames; .*memory"):
        survey(recipe, bare)
    whole = Frame(annotations=annotations([*SUBTASKS, row("done", "memory", 1.0)]), time_s=4.0, index=9, task="t")
    counts = survey(recipe, [*bare, whole])
    assert counts == {"": 6, "high_level_subtask": 6, "low_level_execution": 6, "memory_update": 1}
