"""The texts of manyhands --help and manyhands COMMAND --help."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

from .config import CONFIG_VARIABLE, Settings
from .knobs import Knob, KnobKind, walk_knobs


def overview(summaries: Mapping[str, str]) -> str:
    width = max(len(name) for name in summaries)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
    return "\n".join(
        [
            "usage: manyhands COMMAND [flags]",
            "",
            "Many robots, one mind: robot agents, actors, policy serving, data and learning.",
            "",
            "commands:",
            *lines,
            "",
            "manyhands COMMAND --help   every setting of a command, with defaults and examples",
            "manyhands --version",
            "",
            "New here? 'manyhands doctor' checks this machine, 'manyhands demo' shows the whole system.",
        ]
    )


def command_help(name: str, summary: str, description: str, settings: type[Settings]) -> str:
    knobs = walk_knobs(settings)
    common = set(Settings.model_fields)
    own = [knob for knob in knobs if knob.path[0] not in common]
    flat = [knob for knob in own if len(knob.path) == 1 and not knob.positional]
    groups: dict[str, list[Knob]] = {}
    for knob in own:
        if len(knob.path) > 1:
            groups.setdefault(knob.path[0], []).append(knob)
    positionals = [knob for knob in own if knob.positional]
    words = [knob.metavar + ("..." if knob.kind is KnobKind.LIST else "") for knob in positionals]
    arguments = "".join(f" {word}" if knob.required else f" [{word}]" for word, knob in zip(words, positionals, strict=True))
    lines = [f"usage: manyhands {name}{arguments} [flags]", "", f"{summary[:1].upper()}{summary[1:]}.", ""]
    for paragraph in textwrap.dedent(description).strip().split("\n\n"):
        # Laid out by hand where a line is indented or a command: a listing, a drawing.
        laid_out = any(line.startswith((" ", "manyhands ")) for line in paragraph.splitlines())
        lines += [*(paragraph.splitlines() if laid_out else textwrap.wrap(" ".join(paragraph.split()), _width())), ""]
    sections = [("arguments", positionals), ("settings", flat), *groups.items()]
    for title, members in sections:
        if members:
            lines += [f"{title}:", *(line for knob in members for line in _knob_lines(knob)), ""]
    lines += ["of every command:", *(line for knob in knobs if knob.path[0] in common for line in _knob_lines(knob))]
    lines += [
        "  --config FILE",
        f"      TOML file with any of these settings; also {CONFIG_VARIABLE}",
        "",
        "Each setting can also come from the environment (--rate-hz is MANYHANDS_RATE_HZ, --security.key is",
        "MANYHANDS_SECURITY__KEY) or the file (rate_hz = ..., [security] key = ...). Flags win over the environment,",
        "the environment over the file.",
        "",
        "examples:",
        *(f"  manyhands {name} {example}".rstrip() for example in settings.examples or (_example(own),)),
    ]
    return "\n".join(lines)


def _knob_lines(knob: Knob) -> list[str]:
    if knob.positional:
        head = knob.metavar
    elif knob.kind is KnobKind.SWITCH:
        head = f"{knob.flag}, {knob.negated_flag}"
    else:
        head = f"{knob.flag} {knob.metavar}"
    facts = []
    if knob.positional and knob.choices:
        facts.append(f"one of {', '.join(knob.choices)}")
    if knob.kind in (KnobKind.LIST, KnobKind.MAP):
        facts.append("may be repeated")
    if knob.limits_text:
        facts.append(knob.limits_text)
    if knob.required:
        facts.append("required")
    elif knob.default_text:
        facts.append(f"default: {knob.default_text}")
    elif knob.kind is KnobKind.SWITCH:
        facts.append("default: off")
    text = (knob.info.description or "") + (f" [{'; '.join(facts)}]" if facts else "")
    # Never inside a flag or a path: they are there to be copied.
    indent = " " * 6
    wrapped = textwrap.wrap(
        text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [f"  {head}", *wrapped]


def _example(knobs: list[Knob]) -> str:
    """The shortest command line that is accepted in form."""
    words: list[str] = []
    for knob in knobs:
        if knob.required:
            words += [knob.metavar] if knob.positional else [knob.flag, knob.metavar]
    return " ".join(words)


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 110))
