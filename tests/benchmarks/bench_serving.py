"""pi052 through the whole service: real processes, real gRPC, simulated robots. The table of docs/design/0016.

python -m tests.benchmarks.bench_serving                                  a tiny network on the CPU: does it run?
python -m tests.benchmarks.bench_serving --size full --device cuda --write    also writes docs/benchmarks/<date>-serving.md

One robot shows what the service adds to the engine; 16 robots replan at 5 Hz and ask for a 20-token subtask every 2 s; the
same chunks with more and more text show how much the device has left; and a swap of all weights falls into that load.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.local import Service, Topology
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint
from policies import files as policy_files
from policies.configuration import Precision
from policies.pi052 import config as configs
from policies.pi052.config import NetworkConfig, Pi052Config
from policies.pi052.policy import Pi052Policy
from policies.prompts.locations import LOCATION_TOKENS
from tests.support.text_lab import PI_SPECIAL, bytes_tokenizer

ROOT = Path(__file__).parents[2]
CAMERAS = ("base", "left_wrist", "right_wrist")
ROBOTS, RATE_HZ, ASK_EVERY_S, ASK_TOKENS = 16, 5.0, 2.0, 20
TEXT_LOADS = ((1.0, 60), (1.0, 120))
REQUIRED = {"added_ms": 3.0, "fleet_p99_ms": 100.0, "tokens_per_s": 1000.0, "second_start_s": 60.0}


def make_checkpoint(folder: Path, size: str, device: str) -> None:
    """Random weights in bfloat16 at full size; tokens are bytes with the special tokens of PaliGemma's tokenizer."""
    vocabulary = 257_152 if size == "full" else 8192
    fillers = vocabulary - len(PI_SPECIAL) - 256 - len(LOCATION_TOKENS)
    tokenizer = bytes_tokenizer(PI_SPECIAL, (*LOCATION_TOKENS, *(f"unused {index}" for index in range(fillers))))
    pixels = 224 if size == "full" else 16
    cameras = [
        Feature(name=f"observation.images.{name}", kind=FeatureKind.IMAGE, dtype="uint8", shape=(pixels, pixels, 3))
        for name in CAMERAS
    ]
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(8,))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(8,))
    spec = Spec(observation=(*cameras, state), action=(action,), control_rate_hz=50.0)
    network = NetworkConfig(precision=Precision.BFLOAT16)
    config = Pi052Config(network=network, fast_weight=0.0)
    if size == "tiny":
        tiny = configs.dump(configs.TINY)
        config = configs.parse({**tiny, "network": {**tiny["network"], "vocabulary": vocabulary}, "byte_prompts": False,
                                "prompt_length": 200, "fast_weight": 0.0})  # fmt: skip
    with torch.device("meta"):
        policy = Pi052Policy.from_config(configs.dump(config), spec)
    policy.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            if "normalizer" in name:
                tensor.fill_(-1.0 if name.endswith("first") else 1.0)
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1)
    policy.take_files({policy_files.TOKENIZER: tokenizer.to_str().encode()})
    checkpoint.save(policy, folder)


def start(topology: Topology, folder: Path, device: str, name: str, *flags: str) -> tuple[Service, float]:
    """The server and how long it took to be ready."""
    began = time.perf_counter()
    command = ["serve", "--model", f"pi052={folder}", "--device", device, "--path", "fused", "--max-batch", str(ROBOTS)]
    service = topology.start(name, [*command, "--address", "127.0.0.1:0", *flags], timeout_s=400.0)
    return service, time.perf_counter() - began


def load(address: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What manyhands loadtest found."""
    report = folder / "load.json"
    command = [sys.executable, "-m", "manyhands", "loadtest", "--address", address, "--json", str(report)]
    subprocess.run([*command, "--deadline-ms", "100", *flags], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def added_ms(found: dict[str, Any]) -> float:
    """What the service adds to vision, prefix and Euler steps, at the median, as the robot sees it."""
    stages = found["stage_ms"]
    return float(found["latency_ms"]["p50"] - stages["prefix"]["p50"] - stages["sample"]["p50"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--folder", type=Path, default=None, help="for the checkpoint; memory is faster than a disk")
    parser.add_argument("--one-start", action="store_true", help="leave the second start out")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    seconds = ["--seconds", str(options.seconds)]
    fleet = ["--robots", str(ROBOTS), "--rate-hz", str(RATE_HZ), *seconds]
    out = Path(os.environ.get("OUT", ROOT / "docs" / "benchmarks"))
    with tempfile.TemporaryDirectory(dir=options.folder) as directory:
        folder = Path(directory)
        with Topology(folder / "logs") as topology:
            try:
                make_checkpoint(folder / "pi052", options.size, options.device)
                service, first_s = start(topology, folder / "pi052", options.device, "serve")
                print(f"ready after {first_s:.1f} s", flush=True)
                alone = load(service.address, folder, "--robots", "1", "--rate-hz", "10", *seconds)
                print(json.dumps(alone), flush=True)
                asking = ["--ask-every-s", str(ASK_EVERY_S), "--ask-tokens", str(ASK_TOKENS)]
                many = load(service.address, folder, *fleet, *asking)
                print(json.dumps(many), flush=True)
                texts = []
                for every, tokens in TEXT_LOADS:
                    asking = ["--ask-every-s", str(every), "--ask-tokens", str(tokens)]
                    texts.append(load(service.address, folder, *fleet, *asking))
                    print(json.dumps(texts[-1]), flush=True)
                topology.stop()
                second_s = float("nan")
                if not options.one_start:
                    second_s = start(topology, folder / "pi052", options.device, "serve-again")[1]
            finally:
                for log in (folder / "logs").glob("*.log"):
                    print(log.name, log.read_text()[-3000:], flush=True)
    lines = report(options, alone, many, texts, first_s, second_s)
    print("\n".join(lines))
    if options.write:
        (out / f"{datetime.date.today()}-serving.md").write_text("\n".join(lines) + "\n")


def report(
    options: argparse.Namespace,
    alone: dict[str, Any],
    many: dict[str, Any],
    texts: list[dict[str, Any]],
    first_s: float,
    second_s: float,
) -> list[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    kept = [
        found["text"]["tokens_per_s"] for found in [many, *texts] if not found["missed_deadlines"] and not found["errors"]
    ]
    rows = [
        ("one robot, JPEG: p50 / p99, ms", f"{alone['latency_ms']['p50']:.2f} / {alone['latency_ms']['p99']:.2f}", "-"),
        ("of that, added to the engine at p50, ms", f"{added_ms(alone):.2f}", f"{REQUIRED['added_ms']:g}"),
        (f"{ROBOTS} robots at {RATE_HZ:g} Hz with subtasks: p50 / p99, ms",
         f"{many['latency_ms']['p50']:.1f} / {many['latency_ms']['p99']:.1f}", f"p99 {REQUIRED['fleet_p99_ms']:g}"),
        ("missed deadlines, errors, refusals", f"{many['missed_deadlines']}, {many['errors']}, {many['refusals']}", "0"),
        ("highest text rate without a miss, tokens/s", f"{max(kept, default=0.0):.0f}", f"{REQUIRED['tokens_per_s']:g}"),
        ("first start, command to ready, s", f"{first_s:.1f}", "-"),
        ("second start, s", f"{second_s:.1f}", f"{REQUIRED['second_start_s']:g}"),
    ]  # fmt: skip
    lines = [
        f"# pi052 through the service, {options.size} network",
        "",
        f"{where}; torch {torch.__version__}; commit {commit.stdout.strip() or 'unknown'}; {options.seconds:g} s a load.",
        "3 cameras, 10 Euler steps, random weights; robots on the same machine, JPEG q95 over loopback gRPC, 100 ms given.",
        "",
        "| | measured | required |",
        "|---|---|---|",
        *(f"| {name} | {value} | {wanted} |" for name, value, wanted in rows),
        "",
        "| text asked for | tokens/s | chunk p50 / p99, ms | missed | first token p50 / p99, ms |",
        "|---|---|---|---|---|",
    ]
    for (every, tokens), found in zip(((ASK_EVERY_S, ASK_TOKENS), *TEXT_LOADS), [many, *texts], strict=True):
        latency, first = found["latency_ms"], found["text"]["first_token_ms"]
        first_token = "-" if first["p50"] is None else f"{first['p50']:.0f} / {first['p99']:.0f}"
        lines.append(
            f"| {tokens} every {every:g} s | {found['text']['tokens_per_s']:.0f} "
            f"| {latency['p50']:.1f} / {latency['p99']:.1f} | {found['missed_deadlines']} of {found['requests']} "
            f"| {first_token} |"
        )
    stages = {stage: values["p50"] for stage, values in many["stage_ms"].items()}
    batch = np.round(many["mean_batch_size"], 2)
    lines += [
        "",
        f"Stages at p50 under the fleet, ms: {json.dumps({k: round(v, 2) for k, v in stages.items()})}; batch {batch}.",
    ]
    return lines


if __name__ == "__main__":
    main()
