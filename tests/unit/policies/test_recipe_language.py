"""Recipes are checked on reading: every error names file, component and key."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import yaml

from manyhands.errors import InvalidInput, NotFound
from policies.recipes import recipe as recipes
from policies.recipes.annotations import parse_binding

TURN = {"role": "user", "content": "${task}", "stream": "low_level"}


def blend(**changes):
    return {"blend": {"act": {"weight": 1.0, "messages": [TURN], **changes}}}


def turn(**changes):
    return {"messages": [{**TURN, **changes}]}


def without(name):
    return {"messages": [{key: value for key, value in TURN.items() if key != name}]}


@pytest.mark.parametrize("name", recipes.SHIPPED)
def test_shipped_recipes_load_by_name_and_by_lerobots_path(name):
    assert recipes.load(name) == recipes.load(f"recipes/{name}.yaml")
    assert recipes.load(name).name == name


def test_weights_of_the_shipped_blends():
    def weights(name):
        return [component.weight for component in recipes.load(name).components]

    assert weights("subtask") == [0.30, 0.70]
    assert weights("subtask_mem") == [0.25, 0.60, 0.15]
    assert weights("subtask_mem_vqa_speech") == [0.25, 0.40, 0.10, 0.10, 0.075, 0.075]
    assert weights("subtask_joint") == [1.0]


def test_an_unknown_name_lists_what_there_is(tmp_path):
    with pytest.raises(NotFound, match="subtask_joint"):
        recipes.load("subtasks")
    with pytest.raises(NotFound, match="subtask_joint"):
        recipes.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is empty"),
        ({}, "is empty"),
        ([], "must be a mapping"),
        ({"blend": {}}, "blend is empty"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [TURN], "blend": {}}, "messages or blend, one of the two"),
        ({"messages": [TURN], "weight": 1.0}, "weight is not known"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello', must be a mapping"),
        ({"blend": {"act": {"weight": 1, "messages": [TURN]}}, "bindings": {}}, "bindings belongs to a component"),
        ({"messages": [{**TURN, "content": "do ${ task }"}]}, r"messages\[0\].content holds '\$\{ task \}', which is no"),
        ({"messages": [{**TURN, "content": [{"type": "text", "text": "${task"}]}]}, r"holds '\$\{task', which is no"),
        (blend(weight=0), "component 'act': weight is 0, must be a number > 0"),
        (blend(weight=None), "component 'act': weight is None"),
        (blend(weight=True), "component 'act': weight is True"),
        (blend(weight="2"), "component 'act': weight is '2'"),
        (blend(wieght=1.0), "component 'act': wieght is not known"),
        (blend(route="speech"), "component 'act': route is 'speech'"),
        (blend(messages=[]), "component 'act': messages is empty"),
        ({"blend": {"act": None}}, "component 'act': weight is None"),
        (turn(rôle="user"), r"messages\[0\].rôle is not known; content, if_present"),
        (turn(role="robot"), r"messages\[0\].role is 'robot', must be one of user"),
        (turn(stream="mid_level"), r"messages\[0\].stream is 'mid_level', must be one of high_level, low_level"),
        (without("stream"), r"messages\[0\].stream is None"),
        (without("content"), r"messages\[0\].content is missing"),
        (turn(content=3), r"messages\[0\].content is 3"),
        (turn(content="", target=True), r"messages\[0\].content is empty"),
        (turn(target="yes"), r"messages\[0\].target is 'yes', must be true or false"),
        (turn(if_present=1), r"messages\[0\].if_present is 1, must be text"),
        (turn(content="${sutbask}"), r"messages\[0\] refers to 'sutbask', which no binding names; known: .*subtask"),
        (turn(if_present="sutbask"), r"messages\[0\] refers to 'sutbask'"),
        (turn(tool_calls_from="speach"), r"messages\[0\] refers to 'speach'"),
        (turn(tool_calls_from="task"), "a task has no tool calls"),
        (turn(content=[{"type": "video"}]), r"messages\[0\].content\[0\].type is 'video'"),
        (turn(content=[{"type": {}}]), r"content\[0\].type is {}"),
        (turn(content=["text"]), r"messages\[0\].content\[0\].type is None"),
        (turn(content=[{"type": "text", "text": "${nobody}"}]), "refers to 'nobody'"),
        (turn(content=[{"type": "image"}]), r"messages\[0\].content\[0\].feature is None"),
        (turn(content=[{"type": "text", "text": "a", "feature": "b"}]), r"content\[0\].feature is not known"),
        (turn(stream="high_level"), "teaches nothing"),
        ({"messages": [TURN], "bindings": {"x": "active(t)"}}, r"bindings.x is 'active\(t\)'; write one of active_at"),
        ({"messages": [TURN], "bindings": {"task": "active_at(t, style=plan)"}}, "bindings.task is no name"),
        ({"messages": [TURN], "bindings": "x"}, "bindings is 'x'"),
        ({"messages": [TURN], "bindings": {"x": "active_at(t, stile=plan)"}}, "argument 'stile', which active_at does not"),
    ],
)
def test_errors_name_file_component_and_key(value, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        recipes.parse(value, name="mine", source="folder/mine.yaml")
    assert "folder/mine.yaml: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("messages: [", "is not YAML"),
        ("? {a: 1}\n: 2\n", "is not YAML"),
        ("[" * 5000, "is nested too deeply"),
        ("2024-13-45: 1", "is not YAML: month must be"),
        ("messages: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("blend:\n  a: {weight: 1}\n  a: {weight: 2}\n", "line 3: a stands there twice"),
    ],
)
def test_files(tmp_path: Path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=says) as caught:
        recipes.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"mine\.yaml is not YAML"):
        recipes.load(tmp_path / "mine.yaml")


def test_a_file_that_is_far_too_large(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(InvalidInput, match="is larger than"):
        recipes.load(tmp_path / "mine.yaml")


def test_questions_are_known_by_route_and_in_older_recipes_by_name():
    value = {"blend": {name: {"weight": 1.0, "messages": [TURN]} for name in ("act", "ask_vqa_top", "look")}}
    value["blend"]["look"]["route"] = "vqa"
    found = [component.is_visual_question for component in recipes.parse(value, name="mine").components]
    assert found == [False, True, True]


def test_a_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text('messages:\n  - {role: user, content: "${task}", stream: low_level}\n')
    recipe = recipes.load(path)
    assert recipe.name == "mine"
    assert recipe.components[0].turns[0].content == "${task}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (3, "is 3"),
        ("subtask", "write one of"),
        ("active_at(t)", "selects nothing"),
        ("active_at(t, style=mood)", "style 'mood'"),
        ("active_at(t, style=vqa)", "use emitted_at"),
        ("active_at(t, style=plan, offset=1)", "'offset', which active_at does not take"),
        ("active_at(t, style)", "name=value"),
        ("active_at(t, style=plan, style=plan)", "each once"),
        ("nth_prev(style=plan, offset=0)", "from 1"),
        ("nth_prev(style=plan, offset=one)", "from 1"),
        ("emitted_at(t, role=robot)", "role 'robot'"),
    ],
)
def test_bindings_that_cannot_be(text, says):
    with pytest.raises(ValueError, match=says):
        parse_binding(text)


def test_a_binding_reads_back():
    text = "nth_prev(style=memory, role=assistant, offset=2)"
    assert str(parse_binding(text)) == text
    assert parse_binding("active_at(t, style='plan')") == parse_binding("active_at(style=plan)")


JUNK = (
    None,
    True,
    -1,
    0.5,
    float("nan"),
    10**400,
    "",
    "x",
    "${",
    "${nobody}",
    "task",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    {None: 2},
)


def places(value, path=()):
    """Of everything inside a recipe as YAML gives it."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@pytest.mark.parametrize("name", recipes.SHIPPED)
def test_a_recipe_with_anything_changed_is_read_or_refused(name):
    """Never another error: whatever stands in a file, the message says where."""
    whole = yaml.safe_load((Path(recipes.__file__).parent / "shipped" / f"{name}.yaml").read_text())
    messages = []
    for path in list(places(whole)):
        for junk in JUNK:
            value = copy.deepcopy(whole)
            inner = functools.reduce(lambda part, key: part[key], path[:-1], value)
            inner[path[-1]] = junk
            try:
                recipes.parse(value, name="mine")
            except InvalidInput as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all("recipe mine: " in message for message in messages)
