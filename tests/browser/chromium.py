"""Debian's chromium, driven by playwright, offline and without a screen."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Literal

from playwright.sync_api import Browser, sync_playwright

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
INSTALL = "apt-get install --yes --no-install-recommends chromium"

ColourScheme = Literal["light", "dark"]


def find_chromium() -> str:
    """Path of the browser; RuntimeError with the command that installs it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError(f"the dashboard is tested in a real browser and chromium is not installed; run: sudo {INSTALL}")
    return path


@contextlib.contextmanager
def running_chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
