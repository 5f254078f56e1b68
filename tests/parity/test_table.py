"""docs/parity.md says which test holds which claim; here it is held to what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import test_mutations, test_smolvla_mutations

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "parity.md").read_text()


def test_every_row_of_the_specification_is_there() -> None:
    rows = re.findall(r"^\| (\d+) \|.*`test_\w+\.py::test_\w+`", PAGE, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 16)]


def test_every_test_it_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    missing = [
        f"{file}::{name}"
        for file, name in sorted(named)
        if not (HERE / file).is_file() or f"def {name}(" not in (HERE / file).read_text()
    ]
    assert missing == []


@pytest.mark.parametrize(("column", "module"), [(1, test_mutations), (2, test_smolvla_mutations)])
def test_every_mistake_is_listed_and_made(column: int, module: object) -> None:
    _, _, section = PAGE.partition("## Mistakes that must be seen")
    cells = [line.strip("|").split("|")[column] for line in section.splitlines() if line.startswith("|")][2:]
    listed = {name.strip() for cell in cells for name in cell.split(";") if name.strip()}
    mistakes = {mistake.name for mistake in module.MISTAKES}  # type: ignore[attr-defined]
    assert {name for name in listed if not name.startswith("`")} == mistakes
    for name in (name.strip("`") for name in listed if name.startswith("`")):
        assert hasattr(module, name), name
