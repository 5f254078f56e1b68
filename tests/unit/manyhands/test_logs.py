"""What a process says of itself on stderr, and what it tells processes that it starts of how."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from manyhands import logs


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The root logger, as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(logs, "_current", logs.current())
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_process_that_is_started_may_log_as_this_one_does(root: logging.Logger) -> None:
    logs.set_up("warning", process="engine", as_json=True)
    assert logs.current() == ("warning", True)
    assert root.level == logging.WARNING
    level, as_json = logs.current()
    logs.set_up(level, process="bring-in", as_json=as_json)
    assert isinstance(root.handlers[0].formatter, logs.JsonFormatter)
