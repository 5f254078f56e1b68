"""The example of docs/guide/add-a-policy.md: put into a copy of the package as the page says, and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guide" / "add-a-policy.md"
CONFORMANCE = ROOT / "tests" / "unit" / "policies" / "test_policy_conformance.py"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, blocks: list[str]) -> Path:
    """A folder with policies as it is after the changes of the page."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "policies", folder / "policies", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "policies" / "linear.py").write_text(blocks[0])
    registry = folder / "policies" / "registry.py"
    opening = "POLICIES: dict[str, str] = {\n"
    assert opening in registry.read_text()
    registry.write_text(registry.read_text().replace(opening, opening + blocks[1]))
    (folder / "test_linear.py").write_text(blocks[2])
    return folder


def test_the_page_changes_three_files(blocks):
    assert len(blocks) == 3
    assert blocks[1].count("\n") == 1, "one line in the registry"


def test_the_example_keeps_every_promise_and_passes_its_own_test(changed):
    # This repository's own pytest settings would put its policies before the changed ones.
    options = ["-k", "linear", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={changed}"]
    command = [sys.executable, "-m", "pytest", str(CONFORMANCE), str(changed / "test_linear.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(changed)}
    result = subprocess.run(command, cwd=changed, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 24, result.stdout


@pytest.mark.parametrize("checker", [["ruff", "check"], ["ruff", "format", "--check"]])
def test_the_example_is_clean(changed, checker):
    command = [str(Path(sys.executable).with_name(checker[0])), *checker[1:], "--config", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [*command, "policies/linear.py", "test_linear.py"], cwd=changed, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
