"""manyhands loadtest as users run it: its own server, a server that dies under it, a plain server beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.local import Topology
from manyhands.clients.inference import InferenceClient
from manyhands.errors import ManyhandsError
from services.loadtest import main, servers, worker
from tests.support.inference_lab import ENVIRONMENT, InProcessService, TalkingPolicy, make_policy
from tests.support.waiting import wait_until


def start(output: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "manyhands", "loadtest", "--json", str(output), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def finish(process: subprocess.Popen[str], output: Path) -> tuple[int, str, dict[str, Any]]:
    printed, _ = process.communicate(timeout=90)
    assert output.exists(), printed
    return process.returncode, printed, json.loads(output.read_text())


def test_a_short_test_of_its_own_server_and_of_the_plain_one(tmp_path: Path) -> None:
    output = tmp_path / "loadtest.json"
    # A deadline that a busy test machine makes too.
    flags = ("--robots", "3", "--rate-hz", "8", "--seconds", "3", "--deadline-ms", "3000", "--compare", "--with-prefix")
    process = start(output, *flags, "--timeline")
    code, printed, result = finish(process, output)
    assert code == 0, printed
    for one in (result, result["plain_server"]):
        assert one["errors"] == 0, one["errors_by_message"]
        assert one["missed_deadlines"] == 0
        # What a stall of the machine took shows as skipped ticks.
        assert one["requests"] + one["skipped"] == pytest.approx(72, abs=4)
        assert one["requests"] == one["chunks"] > 30
        assert one["robots_never_served"] == 0
        assert 0 < one["latency_ms"]["p50"] <= one["latency_ms"]["p99"] <= one["latency_ms"]["max"]
        assert 0 < one["server_cpu_ms_per_request"] < 1000
        # The kernel counts CPU in whole ticks, user and system time each, at both ends of both figures.
        counted_to_ms = 4 * 1e3 / os.sysconf("SC_CLK_TCK") / one["requests"]
        assert 0 < one["server_loop_cpu_ms_per_request"] <= one["server_cpu_ms_per_request"] + counted_to_ms
        assert one["stage_ms"]["sample"]["p50"] > 0
        assert one["chunks_by_version"] == {"0": one["chunks"]}
        assert [latency_ms for _, latency_ms, _ in one["timeline"]].count(one["latency_ms"]["max"]) == 1
    # Fifty actions a second, eight chunks: what robots keep to, and the server is content with.
    assert result["replan_interval_steps"] == 6
    assert set(result["chunks_by_asked_interval_steps"]) == {"6"}
    assert result["mean_batch_size"] >= 1.0
    assert "plain websocket server" in printed
    assert psutil.pid_exists(process.pid) is False


def test_a_server_that_is_killed_meanwhile_is_counted_and_the_exit_code_says_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny"
    servers.make_tiny_checkpoint(checkpoint)
    output = tmp_path / "loadtest.json"
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        serve = topology.start("serve", ["serve", "--model", f"tiny={checkpoint}", "--address", "127.0.0.1:0"])
        flags = ("--robots", "2", "--rate-hz", "10", "--seconds", "3", "--deadline-ms", "3000")
        process = start(output, "--address", serve.address, *flags)
        with InferenceClient(serve.address) as client:
            wait_until(lambda: client.status().chunk_count >= 6, timeout_s=60.0)
        topology.kill("serve")
        code, printed, result = finish(process, output)
    assert code == 1, printed
    # Each robot's stream broke, and each found nobody when it came back.
    assert result["errors"] >= 4
    assert result["chunks"] >= 6
    assert any("Unreachable" in message for message in result["errors_by_message"])
    assert "Unreachable" in printed


def asked(loadtest: psutil.Process) -> bool:
    """Whether robots of the test have had chunks from its own server."""
    for child in loadtest.children(recursive=True):
        listening = [each for each in child.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        if listening:
            address = f"127.0.0.1:{listening[0].laddr.port}"
            with InferenceClient(address) as client, contextlib.suppress(ManyhandsError):  # It may not serve yet.
                return client.status().chunk_count > 0
    return False


def test_ctrl_c_ends_with_the_summary_so_far_and_leaves_no_process(tmp_path: Path) -> None:
    output = tmp_path / "loadtest.json"
    process = start(output, "--robots", "2", "--rate-hz", "10", "--seconds", "600", "--deadline-ms", "3000")
    parent = psutil.Process(process.pid)
    wait_until(lambda: asked(parent), timeout_s=60.0)
    children = parent.children(recursive=True)
    process.send_signal(signal.SIGINT)
    interrupted_s = time.monotonic()
    code, printed, result = finish(process, output)
    assert time.monotonic() - interrupted_s < 12.0
    assert code == 0, printed
    assert result["interrupted"] is True
    assert result["seconds"] < 120
    assert "stopped early" in printed
    assert result["requests"] > 0
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


async def test_questions_are_asked_and_their_tokens_counted() -> None:
    with InProcessService(make_policy(policy_class=TalkingPolicy)) as service:
        settings = main.Settings(
            robots=2, rate_hz=5.0, seconds=2.0, deadline_ms=5000.0, ask_every_s=0.3, ask_tokens=8, camera_px=64,
            task="close the left one",
        )  # fmt: skip
        plan = await asyncio.to_thread(main.make_plan, settings, service.address)
        plan = plan.model_copy(update={"begins_s": time.monotonic()})
        tally = await worker.run(plan, asyncio.Event(), lambda tally: None)
    assert tally.errors == {}
    assert tally.chunks == tally.requests > 10
    # "subtask close the left one", a word a token.
    assert tally.texts >= 4
    assert set(tally.text_tokens) == {5}
    assert tally.tokens == pytest.approx(5 * tally.texts, abs=10)
    assert len(tally.first_token_ms) >= tally.texts
    assert tally.questions - tally.texts <= 2
