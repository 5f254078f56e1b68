"""What prompts say and what is learnt of them; the exact ids are in tests/parity."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from manyhands.errors import Corrupt, InvalidInput, NotFound
from policies import fast
from policies.losses import IGNORED_LABEL
from policies.policy import Sample, TextKind, TextRequest
from policies.prompts import locations
from policies.prompts.messages import parse_spoken, shown, spoken_text, state_bins
from policies.prompts.pi052 import Pi05Prompter, Pi052Prompter, Pi052PromptOptions
from policies.prompts.smolvla import SmolVLA2Prompter, SmolVLA2PromptOptions, SmolVLAPrompter
from policies.prompts.tokenizer import Tokenizer
from policies.recipes import recipe as recipes
from policies.recipes.recipe import ImageBlock, TextBlock
from policies.recipes.render import Message, PromptDropout
from tests.support.text_lab import pi_tokenizer, smol_tokenizer

STATE = np.array([0.0, -1.0, 2.0], dtype=np.float32)
ACTIONS = np.zeros((4, 2), dtype=np.float32)
SUBTASK = {"role": "assistant", "content": "grasp the cup", "style": "subtask", "timestamp": 0.0}


def sample(task="tidy up", *rows, **more):
    return Sample(observation={}, task=task, annotations={"persistent": rows, **more})


@pytest.fixture(scope="module")
def tokenizer():
    return pi_tokenizer()


def prompter(tokenizer, recipe=None, fast_tokenizer=None, **options):
    loaded = recipes.load(recipe) if recipe else None
    return Pi052Prompter(tokenizer, Pi052PromptOptions(recipe=loaded, **options), fast_tokenizer)


def learnt(tokenizer, prompt):
    return tokenizer.decode(prompt.labels[prompt.labels != IGNORED_LABEL])


def ids(tokenizer, text):
    return [tokenizer.id_of("<bos>"), *tokenizer.encode(text).tokens.tolist()]


def test_joint_sample_holds_state_and_teaches_the_subtask_and_its_end(tokenizer):
    prompt = prompter(tokenizer, "subtask_joint").training(sample("tidy up", SUBTASK), STATE, ACTIONS)
    text = "User: tidy up, State: 128 0 255;\nAssistant: grasp the cup<eos>\n"
    assert prompt.tokens.tolist() == ids(tokenizer, text)
    labels = prompt.labels[prompt.labels != IGNORED_LABEL].tolist()
    assert labels[-1] == tokenizer.id_of("<eos>")
    assert tokenizer.decode(labels) == "grasp the cup"
    assert prompt.predicts_actions


def test_without_annotations_a_sample_acts_on_its_task(tokenizer):
    for recipe in (None, "subtask_mem"):
        prompt = prompter(tokenizer, recipe).training(sample("tidy up"), STATE, ACTIONS)
        assert prompt.tokens.tolist() == ids(tokenizer, "User: tidy up, State: 128 0 255;\n")
        assert prompt.predicts_actions
        assert learnt(tokenizer, prompt) == ""


def test_without_a_task_either_it_is_an_error_that_names_the_sample(tokenizer):
    with pytest.raises(InvalidInput, match="sample 7 has neither a task nor annotations"):
        prompter(tokenizer, "subtask_mem").training(
            Sample(observation={}, task="", index=7, annotations=None), STATE, ACTIONS
        )


def test_wordings_take_the_tasks_place_only_when_asked(tokenizer):
    wording = {"role": "user", "content": "clean", "style": "task_aug", "timestamp": 0.0}
    plain = prompter(tokenizer).training(sample("tidy up", wording), STATE, ACTIONS)
    varied = prompter(tokenizer, vary_task=True).training(sample("tidy up", wording), STATE, ACTIONS)
    unworded = prompter(tokenizer, vary_task=True).training(sample("tidy up"), STATE, ACTIONS)
    assert "tidy up" in tokenizer.decode(plain.tokens)
    assert "clean" in tokenizer.decode(varied.tokens)
    assert "tidy up" in tokenizer.decode(unworded.tokens)


def test_a_long_prompt_is_cut_in_training_with_one_warning_and_refused_when_acting(tokenizer, caplog):
    short = prompter(tokenizer, "subtask_joint", prompt_length=20)
    with caplog.at_level(logging.WARNING):
        prompts = [short.training(sample("tidy up", SUBTASK), STATE, ACTIONS) for _ in range(3)]
    assert [len(prompt.tokens) for prompt in prompts] == [len(prompt.labels) for prompt in prompts] == [20] * 3
    assert len(caplog.records) == 1
    assert "prompt_length, 20" in caplog.text
    with pytest.raises(InvalidInput, match=r"task: makes a prompt of \d+ tokens, the limit is 20"):
        short.acting(sample("tidy up"), STATE)
    with pytest.raises(InvalidInput, match="the limit is 20"):
        short.asking(sample("tidy up, quickly"), TextRequest(kind=TextKind.SUBTASK), STATE)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (TextRequest(kind=TextKind.SUBTASK), "User: tidy up\nAssistant:"),
        (TextRequest(kind=TextKind.MEMORY), "User: tidy up\nAssistant:"),
        (
            TextRequest(kind=TextKind.MEMORY, previous_text="one", user_text="two"),
            "User: tidy up\nAssistant: Previous memory: one\nUser: Completed subtask: two\nAssistant:",
        ),
        (TextRequest(kind=TextKind.INTERJECTION, user_text="stop"), "User: tidy up\nUser: stop\nAssistant:"),
        (
            TextRequest(kind=TextKind.INTERJECTION, user_text="stop", previous_text="1. go"),
            "User: tidy up\nAssistant: Previous plan:\n1. go\nUser: stop\nAssistant:",
        ),
        (TextRequest(kind=TextKind.VISUAL_QUESTION, user_text="where?"), "User: where?\nAssistant:"),
    ],
)
def test_requests(tokenizer, request_, text):
    prompt = prompter(tokenizer).asking(sample("tidy up"), request_, STATE)
    assert prompt.tokens.tolist() == ids(tokenizer, text)


def test_joint_mode_asks_with_the_state_and_acts_with_the_subtask(tokenizer):
    joint = prompter(tokenizer, joint=True)
    asked = joint.asking(sample("tidy up"), TextRequest(kind=TextKind.SUBTASK), STATE)
    assert asked.tokens.tolist() == ids(tokenizer, "User: tidy up, State: 128 0 255;\nAssistant:")
    acting = joint.acting(sample("tidy up", subtask="grasp"), STATE)
    assert acting.tokens.tolist() == ids(tokenizer, "User: tidy up, State: 128 0 255;\nAssistant: grasp<eos>\n")
    assert tokenizer.decode(acting.tokens[acting.marks]) == "grasp"
    assert joint.acting(sample("tidy up"), STATE).marks is None


@pytest.mark.parametrize("kind", [TextKind.INTERJECTION, TextKind.VISUAL_QUESTION])
def test_a_request_without_words_is_an_error(tokenizer, kind):
    with pytest.raises(InvalidInput, match="user_text"):
        prompter(tokenizer).asking(sample(), TextRequest(kind=kind, user_text=" "), STATE)


def test_a_state_that_is_no_number_is_an_error(tokenizer):
    with pytest.raises(InvalidInput, match="state: holds nan at 1"):
        prompter(tokenizer).acting(sample(), np.array([0.0, np.nan], dtype=np.float32))


def test_answers_about_pictures_are_learnt_as_locations(tokenizer):
    answer = {"label": "cup", "point": [500, 158], "point_format": "xy"}
    events = [
        {"role": "user", "content": "where?", "style": "vqa", "camera": "observation.images.wrist"},
        {"role": "assistant", "content": json.dumps(answer), "style": "vqa", "camera": "observation.images.wrist"},
    ]
    prompt = prompter(tokenizer, "subtask_mem_vqa_speech").training(sample("tidy up", events=events), STATE, ACTIONS)
    assert learnt(tokenizer, prompt) == "cup <loc0162><loc0512>"
    assert not prompt.predicts_actions


def test_speech_is_written_and_read_back():
    def say(arguments):
        return {"type": "function", "function": {"name": "say", "arguments": arguments}}

    calls = (
        say({"text": "on it"}),
        say('{"text": "and more"}'),
        say("{"),
        say([]),
        {"function": {"name": "wave", "arguments": {"text": "no"}}},
        {},
    )
    message = Message(role="assistant", content="new plan", tool_calls=calls)
    text = "new plan\n<say>on it</say><say>and more</say>"
    assert spoken_text(message) == text
    assert parse_spoken(text) == ("new plan", ["on it", "and more"])
    assert spoken_text(Message(role="assistant", content=None, tool_calls=calls[:1])) == "<say>on it</say>"


def test_only_targets_are_rewritten_as_locations(tokenizer):
    answer = json.dumps({"label": "cup", "point": [500, 158], "point_format": "xy"})
    messages = (Message(role="user", content=answer), Message(role="assistant", content=answer, is_target=True))
    tokens, _ = prompter(tokenizer).write(messages, None)
    assert tokens.tolist() == ids(tokenizer, f"User: {answer}\nAssistant: cup <loc0162><loc0512><eos>\n")


def test_the_state_stands_in_the_last_user_message(tokenizer):
    messages = (Message(role="user", content="a"), Message(role="user", content="b"), Message(role="assistant", content="c"))
    tokens, _ = prompter(tokenizer).write(messages, STATE)
    assert tokens.tolist() == ids(tokenizer, "User: a\nUser: b, State: 128 0 255;\nAssistant: c\n")


def test_dropping_a_message_does_not_drop_the_actions(tokenizer, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "messages:\n"
        '  - {role: user, content: "${task}", stream: high_level}\n'
        '  - {role: user, content: "Completed subtask: ${subtask}", stream: low_level}\n'
    )
    options = Pi052PromptOptions(recipe=recipes.load(path), dropout=PromptDropout(subtask=1.0))
    prompt = Pi052Prompter(tokenizer, options).training(sample("tidy up", SUBTASK), STATE, ACTIONS)
    assert prompt.predicts_actions
    assert prompt.tokens.tolist() == ids(tokenizer, "User: tidy up, State: 128 0 255;\n")


def test_blocks_of_text_are_lines_for_pi052_and_run_on_for_smolvla2(tokenizer):
    content = (TextBlock(text="look: "), ImageBlock(feature="front"), TextBlock(text="where?"))
    message = (Message(role="user", content=content),)
    assert prompter(tokenizer).write(message, None)[0].tolist() == ids(tokenizer, "User: look: \nwhere?\n")
    smol = smol_tokenizer()
    written = SmolVLA2Prompter(smol, SmolVLA2PromptOptions()).write(message)[0]
    assert written.tolist() == smol.encode("<|im_start|>User: look: where?<end_of_utterance>\n").tokens.tolist()


def test_text_begins_with_its_first_word_and_has_no_special_tokens(tokenizer):
    made = prompter(tokenizer)
    tokens = [*tokenizer.encode(" grasp the cup").tokens.tolist(), made.eos_token]
    assert made.text(tokens) == "grasp the cup"


def test_too_many_fast_tokens_are_an_error(tokenizer):
    chunks = np.random.default_rng(0).normal(size=(20, 4, 2))
    fitted = fast.fit(chunks)
    assert len(fitted.encode(chunks[0])) > 4
    with pytest.raises(InvalidInput, match="max_action_tokens is 12"):
        prompter(tokenizer, fast_tokenizer=fitted, max_action_tokens=12, fast_skip_tokens=0).training(
            sample(), STATE, chunks[0]
        )


def test_codes_need_room_in_the_vocabulary(tokenizer):
    fitted = fast.fit(np.random.default_rng(0).normal(size=(20, 4, 2)))
    with pytest.raises(InvalidInput, match="leaves no room for FAST codes"):
        prompter(tokenizer, fast_tokenizer=fitted, fast_skip_tokens=4000)


def test_pi05_has_one_form(tokenizer):
    made = Pi05Prompter(tokenizer, Pi052PromptOptions())
    text = "Task: pick the cup, State: 128 0 255;\nAction: "
    assert made.acting(sample(" pick_the\ncup "), STATE).tokens.tolist() == ids(tokenizer, text)
    assert made.training(sample("pick the cup"), STATE, ACTIONS).labels is None


def test_smolvla2_learns_role_and_end(tokenizer):
    smol = smol_tokenizer()
    made = SmolVLA2Prompter(smol, SmolVLA2PromptOptions(recipe=recipes.load("subtask_joint"), prompt_length=200))
    prompt = made.training(sample("tidy up", SUBTASK), STATE, ACTIONS)
    text = "<|im_start|>User: tidy up<end_of_utterance>\nAssistant: grasp the cup<end_of_utterance>\n"
    assert prompt.tokens.tolist() == smol.encode(text).tokens.tolist()
    target = "Assistant: grasp the cup<end_of_utterance>\n"
    assert prompt.labels[prompt.labels != IGNORED_LABEL].tolist() == smol.encode(target).tokens.tolist()
    assert SmolVLA2PromptOptions().dropout.as_smolvla2
    with pytest.raises(InvalidInput, match="the limit is 48"):
        SmolVLA2Prompter(smol, SmolVLA2PromptOptions()).acting(sample("tidy up " * 9), STATE)


def test_smolvla_reads_the_task_and_one_line_end():
    smol = smol_tokenizer()
    made = SmolVLAPrompter(smol, SmolVLA2PromptOptions())
    assert made.acting(sample("go\n"), STATE).tokens.tolist() == made.acting(sample("go"), STATE).tokens.tolist()
    assert made.text(made.acting(sample("go"), STATE).tokens) == "go\n"


def test_a_prompt_is_shown_with_what_is_learnt(tokenizer):
    made = prompter(tokenizer, "subtask_joint")
    assert shown(made.training(sample("tidy up", SUBTASK), STATE, ACTIONS), tokenizer) == (
        "<bos>User: tidy up, State: 128 0 255;\nAssistant: [[grasp the cup<eos>]]\n"
    )
    assert shown(made.acting(sample("go"), STATE), tokenizer) == "<bos>User: go, State: 128 0 255;\n"


def test_another_models_tokenizer_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="no token '<end_of_utterance>'"):
        SmolVLA2Prompter(tokenizer, SmolVLA2PromptOptions())
    with pytest.raises(InvalidInput, match="no token '<bos>'"):
        Pi052Prompter(smol_tokenizer(), Pi052PromptOptions())


def test_tokenizer_files(tmp_path):
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Corrupt, match="is no tokenizer"):
        Tokenizer.load(tmp_path)


# -- locations ---------------------------------------------------------------------------------------------------------


def test_locations_come_back():
    box = {"detections": [{"label": "lid", "bbox": [100, 200, 300, 400]}, {"label": "red cup", "bbox": [0, 0, 1000, 1000]}]}
    text = locations.from_json(json.dumps(box))
    first, second = locations.parse(text)
    assert (first.label, second.label) == ("lid", "red cup")
    assert first.coordinates == pytest.approx((0.1, 0.2, 0.3, 0.4), abs=1e-3)
    assert second.coordinates == (0.0, 0.0, 1.0, 1.0)


def test_either_order_is_read_and_anything_else_left_out():
    assert locations.parse("<loc0000><loc1023> cup") == locations.parse("cup <loc0000><loc1023>")
    assert locations.parse("cup <loc0000><loc1023>")[0].coordinates == (1.0, 0.0)
    assert locations.parse("cup <loc0000> ; lid <loc0001><loc0002><loc0003> ; yes ; far <loc9999><loc0000>") == []


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        "3",
        "[]",
        '{"answer": "yes"}',
        '{"label": "cup", "point": [1, NaN], "point_format": "xy"}',
        '{"label": "cup", "point": [true, 1], "point_format": "xy"}',
        '{"label": "cup", "point": [1, 2], "point_format": "yx"}',
        '{"label": 3, "point": [1, 2], "point_format": "xy"}',
        '{"label": "cup", "point": [1, 2]}',
        '{"detections": [3, {"label": "a", "bbox": [1, 2, 3]}]}',
        '{"detections": 3}',
        '{"label": "cup", "point": [1, 1' + "0" * 400 + '], "point_format": "xy"}',
        "[" * 100_000,
    ],
)
def test_other_answers_stay_as_they_are(answer):
    assert locations.from_json(answer) is None


def test_coordinates_outside_the_picture_are_brought_to_its_edge():
    answer = {"label": "cup", "point": [-5, 2000], "point_format": "xy"}
    assert locations.from_json(json.dumps(answer)) == "cup <loc1023><loc0000>"


def test_halves_go_to_the_even_token():
    """500 is 511.5 of 1023; the same half at an even neighbour below shows that it is not always up."""
    first, second = 500, 1000 * 2.5 / 1023
    assert second / 1000 * 1023 == 2.5
    answer = {"label": "cup", "point": [first, second], "point_format": "xy"}
    assert locations.from_json(json.dumps(answer)) == "cup <loc0002><loc0512>"


def test_state_bins_at_the_edges():
    assert state_bins(np.array([-1.001, -1.0, 1.0, 9.0])) == "-1 0 255 255"


def test_an_acting_prompt_is_the_same_tokens_as_the_encoder_gives_one_by_one(tokenizer):
    made = prompter(tokenizer).acting(sample("tidy up"), STATE)
    assert made.tokens.dtype == np.int64
    assert made.tokens.tolist() == ids(tokenizer, "User: tidy up, State: 128 0 255;\n")
    encoded = tokenizer.encode("tidy up")
    assert encoded.tokens.dtype == encoded.offsets.dtype == np.int64
    assert encoded.ids == encoded.tokens.tolist()
    assert encoded.offsets.tolist() == [[index, index + 1] for index in range(7)]
    assert tokenizer.encode("").offsets.shape == (0, 2)
