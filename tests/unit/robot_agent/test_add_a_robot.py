"""The example of docs/guide/add-a-robot.md: put into a copy of the package as the page says, tested and driven."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guide" / "add-a-robot.md"
ANY_PORT = ("--address", "127.0.0.1:0")
CONFORMANCE = ROOT / "tests" / "unit" / "robot_agent" / "test_conformance.py"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, blocks: list[str]) -> Path:
    """A folder with robot_agent as it is after the two changes of the page."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "robot_agent", folder / "robot_agent", ignore=shutil.ignore_patterns("__pycache__"))
    robots = folder / "robot_agent" / "robots"
    (robots / "two_servos.py").write_text(blocks[0])
    registry = (robots / "registry.py").read_text()
    opening = "ROBOTS: dict[str, str] = {\n"
    assert opening in registry
    (robots / "registry.py").write_text(registry.replace(opening, opening + blocks[1]))
    return folder


def environment(changed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(changed)}


def test_the_page_changes_two_files_and_shows_how_to_drive(blocks):
    assert len(blocks) == 3
    assert blocks[1].count("\n") == 1, "one line in the registry"


def test_the_example_passes_the_conformance_suite(changed):
    # This repository's own pytest settings would put its robot_agent before the changed one.
    options = ["-k", "two_servos", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={changed}"]
    command = [sys.executable, "-m", "pytest", str(CONFORMANCE), *options]
    result = subprocess.run(command, cwd=changed, env=environment(changed), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15, result.stdout


def test_the_example_drives(changed, blocks, tmp_path):
    serve = [sys.executable, "-m", "manyhands", "robot", "--robot", "two_servos", "--state-dir", str(tmp_path), *ANY_PORT]
    agent = subprocess.Popen(serve, cwd=changed, env=environment(changed), stdout=subprocess.PIPE, text=True)
    try:
        assert agent.stdout is not None
        address = agent.stdout.readline().split()[1]
        assert "127.0.0.1:50061" in blocks[2]
        script = blocks[2].replace("127.0.0.1:50061", address)
        driven = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
        assert driven.returncode == 0, driven.stderr
        assert driven.stdout == "now at [ 0.5 -0.2] cut by a limit: ()\n"
    finally:
        agent.terminate()
        agent.wait(10)
        assert agent.stdout is not None
        agent.stdout.close()


def test_the_example_refuses_to_start_without_its_device(changed, tmp_path):
    command = [sys.executable, "-m", "manyhands", "robot", "--robot", "two_servos", "--state-dir", str(tmp_path), *ANY_PORT]
    result = subprocess.run(
        [*command, "--options", "port=unplugged"],
        cwd=changed,
        env=environment(changed),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode != 0
    assert "no servos on unplugged" in result.stderr
    assert "Traceback" not in result.stderr
