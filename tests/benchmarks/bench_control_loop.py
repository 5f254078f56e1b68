"""Jitter of the real control loop: how late ticks begin at 30 and 100 Hz, against a bare sleep loop in the same run.

The loop under test runs as in 'manyhands actor': its own process, the arm robot in another one, chunks from an inference
service and frames to a store that this process plays over real sockets, two 224-pixel cameras in JPEG.

python tests/benchmarks/bench_control_loop.py            prints the table
python tests/benchmarks/bench_control_loop.py --write    also writes docs/benchmarks/<date>-control-loop.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from manyhands.clients.robot import RobotClient  # noqa: E402
from tests.support.actor_peers import serve_policy, serve_store, start_robot  # noqa: E402
from tests.support.waiting import wait_until  # noqa: E402

RATES_HZ = (30, 100)
IMAGE_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class Row:
    """Lateness in ms of one condition; late is the share of ticks over half a period late."""

    label: str
    ticks: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    late: float
    skipped: int

    @property
    def cells(self) -> str:
        return (
            f"| {self.label} | {self.ticks} | {self.p50_ms:.2f} | {self.p99_ms:.2f} | {self.max_ms:.1f} "
            f"| {self.late:.2%} | {self.skipped} |"
        )


def bare_loop(rate_hz: float, seconds: float) -> None:
    """Child: sleeps to an absolute schedule and does nothing else."""
    period_s, lateness_s, skipped = 1.0 / rate_hz, [], 0
    due_s = time.monotonic()
    for _ in range(int(rate_hz * seconds)):
        due_s += period_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        late_s = time.monotonic() - due_s
        over = int(late_s / period_s)
        skipped += over
        due_s += over * period_s
        lateness_s.append(late_s - over * period_s)
    print(json.dumps({"lateness_s": lateness_s, "skipped": skipped}))


def actor_loop(options: dict[str, Any]) -> None:
    """Child: an actor as 'manyhands actor' builds it, one run, and what its schedule said of every tick."""
    from actor import schedule
    from actor.daemon import Actor, ActorOptions
    from actor.main import SWITCH_INTERVAL_S
    from manyhands.clients.actor import roll_out
    from manyhands.common.v1 import common_pb2
    from manyhands.security import SecuritySettings

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    times: list[schedule.TickTime] = []
    wait = schedule.Schedule.wait

    def noted(self: schedule.Schedule) -> schedule.TickTime:
        times.append(wait(self))
        return times[-1]

    schedule.Schedule.wait = noted  # type: ignore[method-assign]
    actor = Actor(
        ActorOptions(
            robot_address=options["robot"],
            inference_address=options["inference"],
            store_address=options["store"],
            spool_dir=Path(options["spool"]),
            spool_limit_bytes=10**10,
            security=SecuritySettings(),
            image_encoding=common_pb2.IMAGE_ENCODING_JPEG,
            simulation_speed=1.0,
            max_action_age_s=3.0,
            chunk_deadline_s=2.0,
        )
    )
    run = roll_out(
        "line",
        episode_count=1,
        max_episode_steps=options["steps"],
        replan_interval_steps=8,
        dataset=options["dataset"],
    )
    actor.start_run(run)
    wait_until(lambda: actor.status().finished_episode_count == 1, timeout_s=600)
    actor.shut_down(20.0)
    print(json.dumps({"lateness_s": [t.lateness_s for t in times], "skipped": sum(t.skipped_count for t in times)}))


def child(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(label: str, rate_hz: float, measured: dict[str, Any]) -> Row:
    lateness_ms = np.array(measured["lateness_s"][5:]) * 1e3
    return Row(
        label=label,
        ticks=len(lateness_ms),
        p50_ms=float(np.percentile(lateness_ms, 50)),
        p99_ms=float(np.percentile(lateness_ms, 99)),
        max_ms=float(lateness_ms.max()),
        late=float((lateness_ms > 500 / rate_hz).mean()),
        skipped=measured["skipped"],
    )


def measure(rate_hz: int, seconds: float) -> list[Row]:
    rows = [row(f"{rate_hz} Hz, bare sleep (floor)", rate_hz, child("--bare", str(rate_hz), str(seconds)))]
    with tempfile.TemporaryDirectory() as folder:
        robot = start_robot(Path(folder), rate_hz=rate_hz, image_size=IMAGE_SIZE)
        with RobotClient(robot.address) as client:
            spec = client.describe().spec
        (store_server, store), (policy_server, policy) = serve_store(), serve_policy(spec)
        policy.speed = 1e-5  # The goal is never reached: one long episode.
        for label, dataset in (("loop, not recording", ""), ("loop, recording", "bench")):
            options = {
                "robot": robot.address,
                "inference": policy_server.address,
                "store": store_server.address,
                "spool": f"{folder}/spool-{dataset}",
                "dataset": dataset,
                "steps": int(rate_hz * seconds),
            }
            rows.append(row(f"{rate_hz} Hz, {label}", rate_hz, child("--actor", json.dumps(options))))
        assert not store.problems
        robot.terminate()
        policy_server.stop()
        store_server.stop()
    return rows


def processor() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(names)} x {names[0] if names else platform.processor()}"


def report(rows: list[Row], seconds: float, load: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        "# Control-loop jitter",
        "",
        f"`python tests/benchmarks/bench_control_loop.py --write`: {datetime.date.today()}, commit {commit}, {processor()}, "
        f"Python {platform.python_version()}, {seconds:g} s a row. Load average before and after: {load}.",
        "",
        "Lateness of a tick is how long after its place on the absolute schedule it began. The floor is a process that "
        "only sleeps to the same kind of schedule, measured right before. The loop is the actor's, with the arm robot in a "
        f"process of its own, two {IMAGE_SIZE}-pixel cameras as JPEG at every recorded tick, a chunk every 8 ticks; "
        "recording goes to the disk spool and on to a store. Robot, actor, store and inference stand-ins share these "
        "processors; on a robot PC only the first two do.",
        "",
        "| condition | ticks | p50 ms | p99 ms | max ms | over half a period late | periods skipped |",
        "|---|---|---|---|---|---|---|",
        *(line.cells for line in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--actor", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare_loop(float(arguments.bare[0]), float(arguments.bare[1]))
        return
    if arguments.actor:
        actor_loop(json.loads(arguments.actor))
        return
    before = os.getloadavg()[0]
    rows = [line for rate_hz in RATES_HZ for line in measure(rate_hz, arguments.seconds)]
    text = report(rows, arguments.seconds, f"{before:.1f}, {os.getloadavg()[0]:.1f}")
    print(text)
    if arguments.write:
        path = ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-control-loop.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
