"""Logging of every process: one record a line on stderr, with the process's name; as text or as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

_current = ("info", False)


def current() -> tuple[str, bool]:
    """The level and whether it is JSON, as set_up() was told: for a process that is started by this one."""
    return _current


def set_up(level: str = "info", *, process: str, as_json: bool = False) -> None:
    """Replaces the root logger's handlers by one on stderr.

    Args:
        level: debug, info, warning or error.
        process: As in "robot" or "actor/left-arm"; stands in every record.
        as_json: One object a line, for log collectors.
    """
    global _current
    _current = (level, as_json)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if as_json else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their information is noise at our level: connection states, fonts, traces of every request.
    for chatty in ("asyncio", "matplotlib", "aiohttp.access", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def one_line(text: str) -> str:
    """text with control characters shown: a peer's message must not forge a record of its own."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class TextFormatter(logging.Formatter):
    """2026-01-31T12:00:00.000Z INFO robot[4711] robot_agent.main: message"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = f"{process}[{os.getpid()}]"

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {one_line(self.process)} {record.name}: {one_line(record.getMessage())}"
        if record.exc_info:
            # A traceback stays on its record's line for a collector, and readable for a person.
            line += " | " + " | ".join(one_line(part) for part in self.formatException(record.exc_info).splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """{"time": ..., "level": ..., "process": ..., "pid": ..., "logger": ..., "message": ..., "traceback": ...}"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "process": self.process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
