"""A picture of a page, for docs/pictures: python tests/browser/screenshot.py URL FILE [--width 1600] [--dark]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.browser.chromium import running_chromium


def take(url: str, file: Path, *, width: int, height: int | None, dark: bool, after_s: float) -> None:
    """height None takes the whole page."""
    with running_chromium() as browser:
        page = browser.new_page(
            viewport={"width": width, "height": height or 1000}, color_scheme="dark" if dark else "light"
        )
        page.goto(url)
        page.wait_for_selector("#link[data-state=live]")
        page.wait_for_timeout(after_s * 1000)
        page.screenshot(path=str(file), full_page=height is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=1600, help="pixels")
    parser.add_argument("--height", type=int, help="pixels; the whole page if left out")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--after-s", type=float, default=6.0, help="how long plots gather before the picture")
    arguments = parser.parse_args()
    take(
        arguments.url, arguments.file, width=arguments.width, height=arguments.height, dark=arguments.dark,
        after_s=arguments.after_s,
    )  # fmt: skip
    print(arguments.file)


if __name__ == "__main__":
    main()
