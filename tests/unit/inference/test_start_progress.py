"""What is seen of an engine that loads: a bar on a terminal, a line of the log for each phase elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from services.inference.start_progress import StartProgress


def test_on_a_terminal_phases_are_shown_with_how_far_they_are() -> None:
    seen = io.StringIO()
    with StartProgress(Console(file=seen, force_terminal=True, width=100)) as progress:
        progress.show("loading the engine's libraries", 0, 0)
        progress.show("loading reach", 250, 1000)
        progress.show("loading reach", 500, 1000)
        progress.show("preparing reach", 18, 18)
    assert "loading reach" in seen.getvalue()
    assert "50%" in seen.getvalue()
    assert "preparing reach" in seen.getvalue()
    assert "100%" in seen.getvalue()


def test_elsewhere_each_phase_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    with caplog.at_level(logging.INFO), StartProgress(Console(file=written, force_terminal=False)) as progress:
        for done in range(100):
            progress.show("loading reach", done, 100)
        progress.show("preparing reach", 1, 18)
    assert [record.getMessage() for record in caplog.records] == ["loading reach", "preparing reach"]
    assert written.getvalue().strip() == ""
