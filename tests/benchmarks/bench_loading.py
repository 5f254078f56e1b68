"""Memory and time of loading a pi052 checkpoint in bfloat16, in a process of its own: peak over the weights' bytes.

python -m tests.benchmarks.bench_loading                   a network of some 300 MB
python -m tests.benchmarks.bench_loading --size full --write    8.7 GiB; also writes docs/benchmarks/<date>-loading.md

The floor is 1: the weights themselves. A loader that builds the module first and then reads the file needs 2 and more.
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
from pathlib import Path
from typing import Any

import torch

from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint
from policies.configuration import Precision, TowerSize
from policies.pi052 import config as configs
from policies.pi052.config import NetworkConfig, Pi052Config
from policies.pi052.policy import Pi052Policy

ROOT = Path(__file__).parents[2]
SIZES = {
    "full": NetworkConfig(precision=Precision.BFLOAT16),
    "small": NetworkConfig(
        precision=Precision.BFLOAT16,
        language=TowerSize(width=512, depth=4, mlp=2048),
        expert=TowerSize(width=256, depth=4, mlp=1024),
        vocabulary=65536,
    ),
}
SPEC = Spec(
    observation=(
        Feature(name="observation.images.front", kind=FeatureKind.IMAGE, dtype="uint8", shape=(224, 224, 3)),
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(14,)),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(14,)),),
    control_rate_hz=50.0,
)
LOAD = """
import json, sys, time
from pathlib import Path
import policies.pi052.policy
from policies import loading
# Not ru_maxrss, which a process takes over from the one that started it.
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, began = peak(), time.perf_counter()
policy = loading.load(Path(sys.argv[1]))
seconds = time.perf_counter() - began
weights = sum(tensor.numel() * tensor.element_size() for tensor in policy.state_dict().values())
print(json.dumps({"weights": weights, "peak": peak() - before, "seconds": seconds}))
"""


@torch.no_grad()
def make(folder: Path, network: NetworkConfig) -> None:
    with torch.device("meta"):
        policy = Pi052Policy.from_config(configs.dump(Pi052Config(network=network)), SPEC)
    policy.to_empty(device="cpu")
    for tensor in policy.state_dict().values():
        tensor.fill_(0.01)
    checkpoint.save(policy, folder)


def measure(folder: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--write", action="store_true")
    settings = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "checkpoint"
        make(folder, SIZES[settings.size])
        found = measure(folder)
    weights, peak = found["weights"] / 2**30, found["peak"] / 2**30
    report = f"""# Loading pi052 in bfloat16, {datetime.date.today()}

`python -m tests.benchmarks.bench_loading --size {settings.size}` on {os.cpu_count()} cores ({platform.machine()}),
torch {torch.__version__}, commit {commit}. One run in a fresh process; the file was just written.

| | GiB | of the weights |
|---|---|---|
| weights | {weights:.2f} | 1.00 |
| peak while loading | {peak:.2f} | {peak / weights:.3f} |
| required at most | {1.3 * weights:.2f} | 1.3 |

{found["seconds"]:.0f} s, every number checked to be finite.
"""
    print(report)
    if settings.write:
        (ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-loading.md").write_text(report)


if __name__ == "__main__":
    main()
