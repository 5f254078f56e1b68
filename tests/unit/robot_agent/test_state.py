"""What an agent remembers over a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyhands.errors import Corrupt, Refused
from robot_agent.state import StateDirectory


def test_epochs_and_stops_outlive_the_process(tmp_path):
    first = StateDirectory(tmp_path / "left")
    assert (first.last_epoch(), first.stop_reason()) == (0, None)
    first.save_epoch(41)
    first.latch_stop("smoke")
    first.close()
    second = StateDirectory(tmp_path / "left")
    assert (second.last_epoch(), second.stop_reason()) == (41, "smoke")
    second.close()


def test_two_agents_cannot_share_a_memory(tmp_path):
    first = StateDirectory(tmp_path)
    with pytest.raises(Refused, match="another robot agent"):
        StateDirectory(tmp_path)
    first.close()
    StateDirectory(tmp_path).close()


def test_a_stop_is_cleared_beside_a_running_agent(tmp_path):
    running = StateDirectory(tmp_path)
    running.latch_stop("smoke")
    local = StateDirectory(tmp_path, lock=False)
    assert local.clear_stop()
    assert not local.clear_stop()
    assert running.stop_reason() is None
    running.close()


def test_a_latch_without_a_reason_still_latches(tmp_path):
    (tmp_path / "emergency-stop").touch()
    assert StateDirectory(tmp_path, lock=False).stop_reason() == "unknown"


def test_a_damaged_epoch_is_not_guessed(tmp_path):
    (tmp_path / "epoch").write_text("4x\n")
    with pytest.raises(Corrupt, match="epoch"):
        StateDirectory(tmp_path, lock=False).last_epoch()


def test_what_is_written_is_synced_file_and_folder(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(str(Path(f"/proc/self/fd/{number}").readlink())), real(number))[1]
    )
    state = StateDirectory(tmp_path, lock=False)
    state.save_epoch(1)
    state.latch_stop("smoke")
    state.clear_stop()
    assert synced == [
        str(tmp_path / ".epoch.new"),
        str(tmp_path),
        str(tmp_path / ".emergency-stop.new"),
        *[str(tmp_path)] * 2,
    ]
