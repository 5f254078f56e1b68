"""Where the time of a lone robot's request goes beside the model, without a GPU: by stage, with a device that is a clock.

    python -m tests.benchmarks.bench_one_robot [--seconds 15] [--rate-hz 10] [--write]

`manyhands serve` and `manyhands loadtest` as users run them, three 224-pixel JPEG cameras, pi052 on the fused path with a
tiny network whose units take as long as the full one's on an H200 (tests/support/simulated_device.py). What is added is what
the robot waits for more than those.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from pathlib import Path

from services.inference import engine_client
from services.inference import main as serve
from services.loadtest.plan import STAGES
from services.loadtest.servers import ServerProcess
from tests.benchmarks.serving import loads, model
from tests.support.simulated_device import PREFIX_S, STEP_S

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-one-robot.md"
NUM_STEPS = 10


def serve_simulated(checkpoint: Path) -> int:
    """The other process."""
    engine_client.ENGINE_MODULE = "tests.support.simulated_device"
    return serve.main(serve.Settings(model={model.NAME: checkpoint}, address="127.0.0.1:0", path="fused", max_batch=16))


def measure(folder: Path, seconds: float, rate_hz: float) -> tuple[loads.Found, float]:
    """What the load test found, and the milliseconds of CPU that a request cost the server, of its two processes."""
    facts = model.make(folder, "clock", "cpu")
    words = ["-m", "tests.benchmarks.bench_one_robot", "--serve", str(folder / model.NAME)]
    with ServerProcess("manyhands serve", words, folder / "serve.log") as server:
        before_s = server.cpu_s()
        flags = ("--robots", "1", "--rate-hz", str(rate_hz), "--seconds", str(seconds))
        found = loads.run(server.address, str(facts["task"]), folder, *flags, timeout_s=seconds + 60.0)
        return found, (server.cpu_s() - before_s) / max(1, found["requests"]) * 1e3


def report(found: loads.Found, cpu_ms: float, rate_hz: float) -> str:
    latency, stages = found["latency_ms"], found["stage_ms"]
    device_ms = (PREFIX_S + NUM_STEPS * STEP_S) * 1e3
    between = stages["total"]["p50"] - sum(stages[stage]["p50"] for stage in STAGES if stage != "total")
    rows = [
        ("the robot waits", f"{latency['p50']:.2f} / {latency['p99']:.2f}"),
        (f"added to the device's {device_ms:.2f}, at p50", f"{latency['p50'] - device_ms:.2f}"),
        *((f"server: {stage}", f"{stages[stage]['p50']:.2f} / {stages[stage]['p99']:.2f}") for stage in STAGES),
        ("between the server's stages, at p50", f"{between:.2f}"),
        ("outside the server, at p50", f"{latency['p50'] - stages['total']['p50']:.2f}"),
        ("the server's CPU a request", f"{cpu_ms:.2f}"),
    ]
    return "\n".join(
        [
            "# A lone robot's request beside the model",
            "",
            f"{os.cpu_count()} cores ({platform.machine()}), load average {os.getloadavg()[0]:.1f}; {found['chunks']} "
            f"chunks at {rate_hz:g} Hz, {found['errors']} errors.",
            "",
            "| | p50 / p99, ms |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate-hz", type=float, default=10.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    if options.serve is not None:
        return serve_simulated(options.serve)
    with tempfile.TemporaryDirectory() as folder:
        found, cpu_ms = measure(Path(folder), options.seconds, options.rate_hz)
    text = report(found, cpu_ms, options.rate_hz)
    print(text)
    if options.write:
        REPORT.write_text(text)
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
