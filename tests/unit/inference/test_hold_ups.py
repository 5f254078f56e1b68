"""No question is in a chunk's way twice, before the chunk would have been done alone."""

from __future__ import annotations

from services.inference.hold_ups import HoldUps


def test_who_held_a_chunk_up_pauses_while_it_is_there() -> None:
    found = HoldUps()
    found.came("a", 0.016, 0.0)
    found.text_begins(["q", "decoding"], 0.001)
    assert found.text_runs
    found.text_ends()
    assert not found.text_runs
    found.came("b", 0.016, 0.002)  # Nobody runs: it waits for nobody.
    assert found.pausing(0.003, again=False) == {"q", "decoding"}
    found.left("a")
    assert found.pausing(0.003, again=False) == set()


def test_a_chunk_that_comes_while_text_runs_is_held_up_by_it() -> None:
    found = HoldUps()
    found.text_begins(["q"], 0.0)
    found.came("a", 0.016, 0.001)
    found.text_ends()
    assert found.pausing(0.002, again=False) == {"q"}


def test_again_only_after_as_long_as_the_chunk_takes_alone() -> None:
    found = HoldUps()
    found.came("short", 0.010, 0.0)
    found.came("long", 0.030, 0.0)
    found.text_begins(["q"], 0.005)
    found.text_ends()
    assert found.pausing(0.014, again=True) == {"q"}
    assert found.pausing(0.016, again=True) == {"q"}, "the longer one is not done yet"
    found.left("long")
    assert found.pausing(0.016, again=True) == set()
    assert found.pausing(0.016, again=False) == {"q"}
