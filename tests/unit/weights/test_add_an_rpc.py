"""The example of docs/guide/add-an-rpc.md: put into a copy of the tree as the page says, generated and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guide" / "add-an-rpc.md"

_HEADING = re.compile(r"^## \d\. .*`(?P<path>[^`]+)`$")
_PLACE = re.compile(r'^<!-- (?P<how>after|before|at the end|new file)(?: "(?P<anchor>.+)")? -->$')


def pieces() -> list[tuple[str, str, str, str]]:
    """(path, how, anchor, code) of each block of the page that has a place."""
    found = []
    path = ""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if heading := _HEADING.match(line):
            path = heading["path"]
        if place := _PLACE.match(line):
            assert next(lines).startswith("```"), f"{line} wants a block of code below it"
            code = []
            while not (inner := next(lines)).startswith("```"):
                code.append(inner)
            found.append((path, place["how"], place["anchor"] or "", "\n".join(code) + "\n"))
    return found


def insert(tree: Path, path: str, how: str, anchor: str, code: str) -> None:
    file = tree / path
    if how == "new file":
        assert not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if how == "at the end":
        at = len(lines)
    else:
        matches = [number for number, line in enumerate(lines) if anchor in line]
        assert len(matches) == 1, f"{path} has {len(matches)} lines with {anchor!r}"
        at = matches[0] + (how == "after")
    file.write_text("".join([*lines[:at], code, *lines[at:]]), encoding="utf-8")


def test_the_page_s_four_places_make_an_rpc(tmp_path: Path) -> None:
    places = pieces()
    assert len({path for path, *_ in places}) == 4, "an RPC is four places"
    for folder in ("protos", "manyhands", "services", "deploy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for place in places:
        insert(tmp_path, *place)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    proto = "protos/manyhands/weights/v1/weights.proto"
    run("grpc_tools.protoc", "-I", "protos", "--python_out=.", "--grpc_python_out=.", proto)
    run("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests/contract/test_usage.py")
