"""The fixture reader itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import golden
from .golden import Golden


def test_a_missing_folder_says_how_to_point_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANYHANDS_GOLDEN", str(tmp_path / "nowhere"))
    with pytest.raises(AssertionError, match="set MANYHANDS_GOLDEN to the folder"):
        Golden("pi05")


def test_a_folder_without_the_policy_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANYHANDS_GOLDEN", str(tmp_path))
    with pytest.raises(AssertionError, match=r"pi05\.json is not there"):
        Golden("pi05")


def test_a_weight_that_comes_out_differently_is_an_error(pi05_golden: Golden) -> None:
    name, shape, kind, _ = next(row for row in pi05_golden.meta["params"] if row[0].endswith("action_in_proj.bias"))
    with pytest.raises(AssertionError, match="another random stream"):
        golden._weight(name, tuple(shape), kind, "0123456789abcdef")


def test_kinds_of_weights() -> None:
    matrix, unit, vector = (
        golden.draw_weight("a.weight", s, k) for s, k in (((400, 9), "matrix"), ((999,), "unit"), ((999,), "vector"))
    )
    assert matrix.std() == pytest.approx(1 / 3, rel=0.05)
    assert unit.mean() == pytest.approx(1.0, abs=0.02)
    assert vector.std() == pytest.approx(0.1, rel=0.1)
    assert matrix.dtype == unit.dtype == vector.dtype == np.float32
