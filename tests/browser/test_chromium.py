"""Without the browser the tests of the page must fail and say what to install: skipping would look like passing."""

from __future__ import annotations

import pytest

from tests.browser.chromium import find_chromium, running_chromium


def test_a_missing_browser_fails_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"chromium is not installed; run: sudo apt-get install .*chromium"):
        find_chromium()
    with pytest.raises(RuntimeError, match="apt-get install"), running_chromium():
        pass
