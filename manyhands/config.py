"""Typed configuration of every command: flags over environment over TOML file over defaults; unknown keys are refused.

A command is a module with a Settings class (a subclass of Settings below, one described field per knob, units in names)
and main(settings) -> int, the exit code. One field, `store_address`, can be set three ways:

    --store-address 127.0.0.1:50051             a nested one: --security.token-file FILE
    MANYHANDS_STORE_ADDRESS=127.0.0.1:50051     a nested one: MANYHANDS_SECURITY__TOKEN_FILE=FILE
    store_address = "127.0.0.1:50051"           in the TOML file of --config or MANYHANDS_CONFIG

Lists are given by repeating the flag, mappings by repeating KEY=VALUE; the environment takes both as JSON. Sources merge
key by key, so a flag can change one entry of a mapping that the file sets. Building a Settings object in code reads
neither environment nor files: only load() does.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from .errors import InvalidInput
from .knobs import Knob, KnobKind, nested_model, walk_knobs

ENV_PREFIX = "MANYHANDS_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"


class Settings(BaseSettings):
    """Base of every command's configuration."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True)

    # Command lines that work, without "manyhands" and the command's name; --help prints them.
    examples: ClassVar[tuple[str, ...]] = ()

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe records to log")
    log_json: bool = Field(False, description="log one JSON object a line instead of text")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load() reads the other sources itself, so that it can name the source of a bad value.
        return (init_settings,)


S = TypeVar("S", bound=Settings)


class HelpAsked(Exception):
    """--help or -h was among the flags."""


def load(settings_class: type[S], flags: Sequence[str]) -> S:
    """The settings that flags, the process's environment and the TOML file give together.

    Raises:
        InvalidInput: An unknown key, or a bad value; the message names key, value, source, limit and remedy, a line each.
        HelpAsked: Instead, where the flags ask for help.
    """
    knobs = walk_knobs(settings_class)
    from_flags, config_file = parse_flags(knobs, flags)
    from_environment = read_environment(settings_class, knobs)
    config_file = config_file or os.environ.get(CONFIG_VARIABLE, "")
    from_file = read_file(settings_class, Path(config_file)) if config_file else {}
    merged = merge(merge(from_file, from_environment), from_flags)
    try:
        return settings_class(**merged)
    except ValidationError as error:
        sources = (("flag", from_flags), ("environment", from_environment), (config_file, from_file))
        raise _explain(error, knobs, sources) from None


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """low overridden by high, tables key by key."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both_tables = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both_tables else value  # type: ignore[arg-type]
    return merged


def parse_flags(knobs: Sequence[Knob], flags: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Nested values as the flags give them, still text, and the file of --config (or "")."""
    by_flag = {knob.flag: knob for knob in knobs if not knob.positional}
    negated = {knob.negated_flag: knob for knob in by_flag.values() if knob.kind is KnobKind.SWITCH}
    positionals = [knob for knob in knobs if knob.positional]
    values: dict[str, Any] = {}
    seen: set[tuple[str, ...]] = set()
    config_file = ""
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            raise HelpAsked
        if not word.startswith("-") or word == "-":
            if not positionals:
                raise InvalidInput(f"unexpected argument {word!r}; every value belongs to a flag, see --help", field=word)
            knob = positionals[0]
            if knob.kind is not KnobKind.LIST:
                positionals.pop(0)
            _put(values, knob, word)
            continue
        flag, has_value, value = word.partition("=")
        if flag in negated or (flag in by_flag and by_flag[flag].kind is KnobKind.SWITCH):
            switch = negated.get(flag) or by_flag[flag]
            if has_value:
                raise InvalidInput(
                    f"{flag} takes no value (got {value!r}); use {switch.flag} or {switch.negated_flag}", field=flag
                )
            _put(values, switch, flag not in negated)
            continue
        if flag != "--config" and flag not in by_flag:
            known = (*by_flag, *negated, "--config", "--help")
            raise InvalidInput(f"unknown flag {flag}{_nearest(flag, known)}; --help lists all", field=flag)
        if not has_value:
            if not rest or (rest[0].startswith("--") and rest[0].partition("=")[0] in (*by_flag, *negated, "--config")):
                raise InvalidInput("needs a value", field=flag)
            value = rest.pop(0)
        if flag == "--config":
            config_file = value
            continue
        knob = by_flag[flag]
        if knob.path in seen and knob.kind is KnobKind.VALUE:
            raise InvalidInput(f"is given twice (the second time as {value!r}); it takes one value", field=flag)
        seen.add(knob.path)
        _put(values, knob, value)
    return values, config_file


def _put(values: dict[str, Any], knob: Knob, value: str | bool) -> None:
    table = values
    for name in knob.path[:-1]:
        table = table.setdefault(name, {})
    name = knob.path[-1]
    if isinstance(value, bool) or knob.kind in (KnobKind.VALUE, KnobKind.SWITCH):
        table[name] = _json_or_text(value) if knob.structured and isinstance(value, str) else value
    elif knob.kind is KnobKind.LIST:
        items = value.split(",") if knob.numeric_items else [value]
        table.setdefault(name, []).extend(_json_or_text(item) for item in items)
    else:
        key, equals, entry = value.partition("=")
        if not equals or not key:
            raise InvalidInput(f"{value!r} must be KEY=VALUE", field=knob.flag)
        entries = table.setdefault(name, {})
        if key in entries:
            raise InvalidInput(f"key {key!r} is given twice", field=knob.flag)
        entries[key] = _json_or_text(entry)


def _json_or_text(text: str) -> Any:
    """Objects and arrays for the few knobs that hold tables; everything else stays text for pydantic to read."""
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def read_environment(settings_class: type[Settings], knobs: Sequence[Knob]) -> dict[str, Any]:
    """Values of MANYHANDS_* variables; one that no field reads is refused."""
    known = {f"{ENV_PREFIX}{'__'.join(knob.path).upper()}": knob for knob in knobs}
    tables = tuple(f"{name}__" for name, knob in known.items() if knob.kind is KnobKind.MAP or knob.structured)
    parents = {name.rpartition("__")[0] for name in known if "__" in name}
    for variable in os.environ:
        name = variable.upper()
        is_known = name in known or name in parents or name == CONFIG_VARIABLE or name.startswith(tables)
        if name.startswith(ENV_PREFIX) and not is_known:
            raise InvalidInput(
                f"environment variable {variable} is not one this command reads{_nearest(name, known)}; unset it",
                field=variable,
            )
    try:
        return dict(EnvSettingsSource(settings_class)())
    except SettingsError as error:
        broken = [variable for variable, knob in known.items() if f'"{knob.path[0]}"' in str(error)]
        name = broken[0] if broken else ENV_PREFIX
        raise InvalidInput(
            f"{name} = {os.environ.get(name, '')!r} must be JSON, as lists and mappings are in the environment: "
            '["a", "b"] or {"key": "value"}',
            field=name,
        ) from None


def read_file(settings_class: type[Settings], path: Path) -> dict[str, Any]:
    """The TOML file's tables; keys that no field has are refused by name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not TOML: {error}", field="--config") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have.
        raise InvalidInput(f"cannot read {path}: {error}", field="--config") from None
    _refuse_unknown(values, settings_class, path, ())
    return values


def _refuse_unknown(values: Mapping[str, Any], model: type[BaseModel], file: Path, at: tuple[str, ...]) -> None:
    for key, value in values.items():
        name = ".".join((*at, key))
        if key not in model.model_fields:
            known = [".".join((*at, field)) for field in model.model_fields]
            raise InvalidInput(f"unknown key {name} in {file}{_nearest(name, known)}", field=name)
        nested = nested_model(model.model_fields[key].annotation)
        if nested is not None and isinstance(value, Mapping):
            _refuse_unknown(value, nested, file, (*at, key))


def _nearest(key: str, known: Iterable[str]) -> str:
    # Case and separators are what people get wrong most; they must not count as distance.
    plain = {name.lower().replace("_", "-"): name for name in known}
    close = difflib.get_close_matches(key.lower().replace("_", "-"), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _explain(
    error: ValidationError, knobs: Sequence[Knob], sources: Sequence[tuple[str, Mapping[str, Any]]]
) -> InvalidInput:
    by_path = {knob.path: knob for knob in knobs}
    lines: list[str] = []
    fields: list[str] = []
    for problem in error.errors(include_url=False):
        location = tuple(str(part) for part in problem["loc"])
        path = next((location[:n] for n in range(len(location), 0, -1) if location[:n] in by_path), location)
        knob = by_path.get(path)
        label = ".".join(path) or "settings"
        fields.append(label)
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = message.removeprefix("Input should be ")
        value = problem["input"]
        if path != location:  # Inside a list or a mapping: which item.
            message = f"{message[:1].lower()}{message[1:]} at {'.'.join(location[len(path) :])}"
        if problem["type"] == "missing" and knob is not None and path == location:
            where = knob.flag if not knob.positional else knob.metavar
            lines.append(f"{label} is required: give {where}, {knob.variable} or {label} in the --config file")
        elif problem["type"] == "value_error":
            lines.append(f"{label}: {message}" if label not in message else message)
        elif problem["type"] == "missing":
            lines.append(f"{label} = {value!r}{_source_of(path, knob, sources)} is too short: {message}{_advice(knob)}")
        else:
            lines.append(f"{label} = {value!r}{_source_of(path, knob, sources)} must be {message}{_advice(knob)}")
    return InvalidInput("\n".join(lines), field=fields[0] if fields else "")


def _advice(knob: Knob | None) -> str:
    if knob is None:
        return ""
    default = f"; default {knob.default_text}" if knob.default_text else ""
    description = f" ({knob.info.description})" if knob.info.description else ""
    return f"{default}{description}"


def _source_of(path: tuple[str, ...], knob: Knob | None, sources: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    for name, values in sources:
        table: Any = values
        for part in path:
            table = table.get(part, None) if isinstance(table, Mapping) else None
        if table is not None:
            if knob is not None and name == "flag":
                return f" (from {knob.metavar if knob.positional else knob.flag})"
            if knob is not None and name == "environment":
                return f" (from {knob.variable})"
            return f" (from {name})"
    return ""
