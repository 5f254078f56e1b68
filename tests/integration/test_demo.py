"""The demo as a user runs it, with small numbers: every stage works, and Ctrl-C leaves nothing running and valid data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import av
import psutil
import pytest

from tests.support.waiting import wait_until

COMMAND = [sys.executable, "-m", "manyhands", "demo", "--dashboard-address", "127.0.0.1:0"]


def processes_of(output: Path) -> list[str]:
    """Command lines of all processes that work in that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(str(output) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


@pytest.mark.timeout(420)
def test_short_demo_goes_through_every_stage_and_leaves_what_it_promises(tmp_path: Path) -> None:
    output = tmp_path / "out"
    numbers = ["--recorded-episodes", "2", "--untrained-episodes", "1", "--evaluation-episodes", "1", "--train-s", "25"]
    # How well a policy does after that little training is chance; the full demo demands 90 %.
    command = [*COMMAND, "--output", str(output), *numbers, "--required-success", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr

    summary = json.loads((output / "summary.json").read_text())
    assert summary["episodes_recorded"] == 8
    assert sum(task["num_episodes"] for task in summary["success_after"].values()) == 3
    assert len(summary["versions_published"]) >= 2
    assert len(summary["versions_served"]) >= 2
    assert summary["latency_ms"]["count"] > 3
    assert summary["latency_ms"]["p50"] > 0
    assert "Every stage held." in result.stdout
    with av.open(summary["paths"]["video"]) as video:
        pictures = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    assert pictures[0].shape[1] == 3 * 320
    assert len(pictures) > 20
    assert pictures[10].std() > 10  # Robots, not a blank screen.
    assert Path(summary["paths"]["plot"]).read_bytes().startswith(b"\x89PNG")
    assert (Path(summary["paths"]["checkpoint"])).exists()
    assert processes_of(output) == []


@pytest.mark.timeout(180)
def test_ctrl_c_while_recording_ends_every_process_and_leaves_valid_data(tmp_path: Path) -> None:
    output = tmp_path / "out"
    root = output / "store" / "datasets" / "demo"
    demo = subprocess.Popen([*COMMAND, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until((root / "meta" / "info.json").exists, 120, "the first episodes are published")
        demo.send_signal(signal.SIGINT)
        printed, _ = demo.communicate(timeout=40)
    finally:
        demo.kill()
    assert demo.returncode == 130, printed.decode()
    assert b"Interrupted" in printed
    assert processes_of(output) == []
    verdict = subprocess.run(
        [sys.executable, "-m", "manyhands", "dataset", "verify", str(root)], capture_output=True, text=True, timeout=60
    )
    assert verdict.returncode == 0, verdict.stdout
