"""The recipe language: YAML in, a checked Recipe out. Everything that can be wrong is found here, before training starts.

    blend:                              # or messages: of a single component
      high_level_subtask:
        weight: 0.3
        messages:
          - {role: user, content: "${task}", stream: high_level}
          - {role: assistant, content: "${subtask}", stream: high_level, target: true, if_present: subtask}
      low_level_execution: ...

A component has messages, and may have bindings (names of its own for annotation rows) and route: vqa (tried before all
others). docs/design/0013-recipes-and-prompts.md has the whole language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from manyhands.errors import InvalidInput, NotFound

from .annotations import ROLES, Binding, parse_binding

Stream = Literal["high_level", "low_level"]
STREAMS: tuple[Stream, ...] = ("high_level", "low_level")

TASK = "task"
DEFAULT_BINDINGS: Mapping[str, Binding] = {
    name: parse_binding(text)
    for name, text in {
        "subtask": "active_at(t, style=subtask)",
        "memory": "active_at(t, style=memory)",
        "plan": "active_at(t, style=plan)",
        "speech": "emitted_at(t, role=assistant, tool_name=say)",
        "interjection": "emitted_at(t, style=interjection)",
        "vqa": "emitted_at(t, style=vqa, role=assistant)",
        "vqa_query": "emitted_at(t, style=vqa, role=user)",
    }.items()
}
SHIPPED = ("subtask", "subtask_mem", "subtask_mem_vqa_speech", "subtask_joint", "subtasks_vqa")
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_MISWRITTEN = re.compile(r"\$\{(?!\w+\})[^}]*\}?")

_RECIPE_KEYS = {"messages", "blend", "bindings"}
_COMPONENT_KEYS = {"messages", "bindings", "weight", "route"}
_TURN_KEYS = {"role", "content", "stream", "target", "if_present", "tool_calls_from"}
_BLOCK_KEYS = {"text": "text", "image": "feature"}
_MAX_FILE_BYTES = 1 << 20
_MAX_WEIGHT = 1e9


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    text: str


@dataclass(frozen=True, kw_only=True)
class ImageBlock:
    """feature: The camera."""

    feature: str


Content = str | tuple[TextBlock | ImageBlock, ...] | None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message to be.

    Attributes:
        content: With ${name} for the text of a binding; None only with tool_calls_from.
        stream: low_level turns make the sample one of actions.
        is_target: The text is learnt.
        if_present: The turn is left out where this binding finds nothing.
        tool_calls_from: The binding whose row gives the tool calls.
    """

    role: str
    content: Content
    stream: Stream
    is_target: bool = False
    if_present: str | None = None
    tool_calls_from: str | None = None

    def texts(self) -> Iterator[str]:
        """As written, pictures left out."""
        blocks = (TextBlock(text=self.content),) if isinstance(self.content, str) else self.content or ()
        yield from (block.text for block in blocks if isinstance(block, TextBlock))

    def names(self) -> Iterator[str]:
        """Bindings it refers to."""
        for text in self.texts():
            yield from PLACEHOLDER.findall(text)
        yield from (name for name in (self.if_present, self.tool_calls_from) if name is not None)


@dataclass(frozen=True, kw_only=True)
class Component:
    """Attributes:
    bindings: All that its turns refer to, but for the task.
    weight: Its share of a blend, before division by their sum.
    is_visual_question: Wherever it renders it is taken, whatever the draw says: questions stand on few frames.
    """

    name: str
    turns: tuple[Turn, ...]
    bindings: Mapping[str, Binding] = field(default_factory=dict)
    weight: float = 1.0
    is_visual_question: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Attributes:
    name: Of the file, or as given.
    components: In the order written: the draw depends on it.
    """

    name: str
    components: tuple[Component, ...]


def load(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by its name ("subtask_mem", also as lerobot writes it: "recipes/subtask_mem.yaml"), or a file.

    Raises:
        NotFound: Neither a file nor a shipped name; lists those.
        InvalidInput: Names file, component and key.
    """
    path = Path(name_or_path)
    if not path.is_file():
        name = path.stem if path.suffix in {".yaml", ".yml"} else str(name_or_path)
        if name not in SHIPPED:
            raise NotFound(f"{name_or_path} is no file, and no shipped recipe: {', '.join(SHIPPED)}", field="recipe_path")
        path = Path(__file__).parent / "shipped" / f"{name}.yaml"
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InvalidInput(f"{path} is larger than {_MAX_FILE_BYTES} bytes; that is no recipe", field="recipe_path")
    return parse_yaml(path.read_bytes(), name=path.stem, source=str(path))


def parse_yaml(content: bytes, *, name: str, source: str) -> Recipe:
    """A file's content; InvalidInput names source, component and key."""
    try:
        text = content.decode("utf-8")
        value = yaml.safe_load(text)
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), source)
    except InvalidInput:
        raise
    except (yaml.YAMLError, ValueError) as error:  # Also no date, number or text where it looks like one.
        raise InvalidInput(f"{source} is not YAML: {error}", field="recipe_path") from None
    except RecursionError:
        raise InvalidInput(f"{source} is nested too deeply", field="recipe_path") from None
    return parse(value, name=name, source=source)


def parse(value: object, *, name: str, source: str = "") -> Recipe:
    """Of what YAML or JSON gave. source: The file, for messages."""
    place = _Place(source or f"recipe {name}")
    top = place.mapping(value, _RECIPE_KEYS, "")
    if ("messages" in top) == ("blend" in top):
        place.fail("", "is empty" if not top else "needs messages or blend, one of the two")
    if "messages" in top:
        return Recipe(name=name, components=(_component(top, name, place),))
    if "bindings" in top:
        place.fail("bindings", "belongs to a component of the blend")
    blend = top["blend"]
    if not isinstance(blend, Mapping) or not blend:
        place.fail("blend", "is empty; it maps names to components")
    components = []
    for component_name, entry in blend.items():
        inside = _Place(place.source, str(component_name))
        part = inside.mapping(entry, _COMPONENT_KEYS, "")
        weight = part.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _MAX_WEIGHT:
            inside.fail("weight", f"is {weight!r}, must be a number > 0")
        components.append(_component(part, str(component_name), inside))
    return Recipe(name=name, components=tuple(components))


@dataclass(frozen=True)
class _Place:
    """Where in which file: every error names it."""

    source: str
    component: str = ""

    def fail(self, key: str, message: str) -> NoReturn:
        where = f"{self.source}: " + (f"component {self.component!r}: " if self.component else "")
        raise InvalidInput(f"{where}{key + ' ' if key else ''}{message}", field="recipe")

    def mapping(self, value: object, allowed: set[str], key: str) -> Mapping[str, Any]:
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.fail(key, f"is {value!r}, must be a mapping")
        for name in value:
            if name not in allowed:
                self.fail(f"{key}.{name}" if key else str(name), f"is not known; {', '.join(sorted(allowed))} are")
        return value

    def text(self, value: Mapping[str, Any], name: str, key: str) -> str | None:
        found = value.get(name)
        if found is not None and not isinstance(found, str):
            self.fail(f"{key}.{name}", f"is {found!r}, must be text")
        return found


def _component(value: Mapping[str, Any], name: str, place: _Place) -> Component:
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        place.fail("messages", "is empty; it is a list of messages")
    turns = tuple(_turn(message, f"messages[{i}]", place) for i, message in enumerate(messages))
    if not any(turn.is_target or turn.stream == "low_level" for turn in turns):
        place.fail("messages", "teaches nothing: no message has target: true or stream: low_level")
    known = {**DEFAULT_BINDINGS, **_bindings(value.get("bindings"), place)}
    used: dict[str, Binding] = {}
    for index, turn in enumerate(turns):
        for miswritten in filter(None, map(_MISWRITTEN.search, turn.texts())):
            place.fail(
                f"messages[{index}].content", f"holds {miswritten[0]!r}, which is no ${{name}}; it would be learnt as it is"
            )
        for binding in turn.names():
            if binding != TASK and binding not in known:
                names = ", ".join((*sorted(known), TASK))
                place.fail(f"messages[{index}]", f"refers to {binding!r}, which no binding names; known: {names}")
            if binding != TASK:
                used[binding] = known[binding]
        if turn.tool_calls_from == TASK:
            place.fail(f"messages[{index}].tool_calls_from", "must name a binding; a task has no tool calls")
    if value.get("route") not in (None, "vqa"):
        place.fail("route", f"is {value['route']!r}, may only be 'vqa'")
    return Component(
        name=name,
        turns=turns,
        bindings=used,
        weight=float(value.get("weight", 1.0)),
        # Older recipes mark the route by the name alone.
        is_visual_question=value.get("route") == "vqa" or name.startswith("ask_vqa"),
    )


def _bindings(value: object, place: _Place) -> dict[str, Binding]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        place.fail("bindings", f"is {value!r}, must map names to calls as active_at(t, style=subtask)")
    bindings = {}
    for name, text in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name == TASK:
            place.fail(f"bindings.{name}", "is no name for a binding; use letters, digits and _, and not 'task'")
        try:
            bindings[name] = parse_binding(text)
        except ValueError as error:
            place.fail(f"bindings.{name}", str(error))
    return bindings


def _turn(value: object, key: str, place: _Place) -> Turn:
    turn = place.mapping(value, _TURN_KEYS, key)
    if turn.get("role") not in ROLES:
        place.fail(f"{key}.role", f"is {turn.get('role')!r}, must be one of {', '.join(ROLES)}")
    if turn.get("stream") not in STREAMS:
        place.fail(f"{key}.stream", f"is {turn.get('stream')!r}, must be one of {', '.join(STREAMS)}")
    is_target = turn.get("target", False)
    if not isinstance(is_target, bool):
        place.fail(f"{key}.target", f"is {is_target!r}, must be true or false")
    tool_calls_from = place.text(turn, "tool_calls_from", key)
    content = turn.get("content")
    if content is None and tool_calls_from is None:
        place.fail(f"{key}.content", "is missing; only a message with tool_calls_from may have none")
    if isinstance(content, list):
        content = tuple(_block(block, f"{key}.content[{i}]", place) for i, block in enumerate(content))
    elif content is not None and not isinstance(content, str):
        place.fail(f"{key}.content", f"is {content!r}, must be text or a list of blocks")
    if content in ("", ()) and is_target and tool_calls_from is None:
        place.fail(f"{key}.content", "is empty, there is nothing to learn from it")
    return Turn(
        role=turn["role"],
        content=content,
        stream=turn["stream"],
        is_target=is_target,
        if_present=place.text(turn, "if_present", key),
        tool_calls_from=tool_calls_from,
    )


def _block(value: object, key: str, place: _Place) -> TextBlock | ImageBlock:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _BLOCK_KEYS:
        place.fail(f"{key}.type", f"is {kind!r}, must be one of {', '.join(_BLOCK_KEYS)}")
    name = _BLOCK_KEYS[kind]
    block = place.mapping(value, {"type", name}, key)
    if not isinstance(block.get(name), str):
        place.fail(f"{key}.{name}", f"is {block.get(name)!r}, must be text")
    return TextBlock(text=block[name]) if kind == "text" else ImageBlock(feature=block[name])


def _refuse_repeated_keys(node: yaml.Node | None, source: str) -> None:
    """YAML readers silently take the last of two; a component would vanish."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:  # An anchor used twice is one node.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            names: set[object] = set()
            for name, value in node.value:
                if name.value in names:
                    line = name.start_mark.line + 1
                    raise InvalidInput(f"{source}, line {line}: {name.value} stands there twice", field="recipe")
                names.add(name.value)
                todo.append(value)
