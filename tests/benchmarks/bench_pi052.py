"""One chunk and one subtask of pi052 through the plain path, part by part: vision, prefix, expert steps, text steps.

python -m tests.benchmarks.bench_pi052                       tiny network on the CPU
python -m tests.benchmarks.bench_pi052 --size full --device cuda --write    also writes docs/benchmarks/<date>-pi052.md

Weights are random, bfloat16 for the full size; batch 1, three cameras, 200 tokens, 50 actions, 10 steps, 20 tokens of text.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from policies import text  # noqa: E402
from policies.pi052 import sampling  # noqa: E402
from policies.pi052.config import NetworkConfig, Precision, TowerSize, VisionSize  # noqa: E402
from policies.pi052.model import Pi052Network  # noqa: E402

NUM_CAMERAS, NUM_TOKENS, HORIZON, NUM_STEPS, NUM_TEXT = 3, 200, 50, 10, 20
# One H200, 3 cameras, 200 tokens, batch 1: ms of the matrix products alone, and of others' whole chunks.
REFERENCES = {"floor": 7.5, "lerobot main, eager": 228.0, "lerobot main, compiled": 61.0, "captured graph": 22.6}
SIZES = {
    "full": NetworkConfig(precision=Precision.BFLOAT16),
    "tiny": NetworkConfig(
        vision=VisionSize(width=64, depth=2, mlp=128, heads=4),
        language=TowerSize(width=64, depth=2, mlp=128, head_dim=16),
        expert=TowerSize(width=32, depth=2, mlp=64, head_dim=16),
        vocabulary=257152,
    ),
}


def measure(device: torch.device, step: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of count calls, after three that warm up."""
    found = []
    for index in range(count + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= 3:
            found.append((time.perf_counter() - begin) * 1e3)
    return found


@torch.inference_mode()
def parts(network: Pi052Network, device: torch.device, rows: int, count: int) -> dict[str, list[float]]:
    config = network.config
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(rows, NUM_CAMERAS, 3, config.image_height, config.image_width, generator=generator) * 2 - 1
    pictures = pictures.to(device)
    seen = torch.ones(rows, NUM_CAMERAS, dtype=torch.bool, device=device)
    tokens = torch.randint(4, 250_000, (rows, NUM_TOKENS), generator=generator).to(device)
    noise = torch.randn(rows, HORIZON, config.action_size, generator=generator).to(device)
    times = torch.full((rows, 1), 0.5, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    rules = text.Decoding(max_new_tokens=NUM_TEXT, min_new_tokens=NUM_TEXT)

    picture_tokens = network.encode_pictures(pictures)
    prefix = network.embed_prefix(picture_tokens, seen, tokens, valid)
    state = network.run_prefix(prefix, hidden=True)

    def chunk() -> torch.Tensor:
        embedded = network.embed_prefix(network.encode_pictures(pictures), seen, tokens, valid)
        velocity = sampling.velocity_of(network, network.run_prefix(embedded, hidden=False))
        return sampling.guided_chunk(velocity, noise, NUM_STEPS)

    return {
        "vision": measure(device, lambda: network.encode_pictures(pictures), count),
        "prefix": measure(device, lambda: network.run_prefix(prefix, hidden=False), count),
        "expert step": measure(device, lambda: network.expert_step(state, noise[:, None], times), count),
        f"chunk, {NUM_STEPS} steps": measure(device, chunk, count),
        "text step": measure(device, lambda: network.text_step(state, tokens[:, 0]), count),
        f"subtask of {NUM_TEXT} tokens, prefix given": measure(
            device, lambda: text.generate_ids(network, state, rules), max(3, count // 5)
        ),
    }


def report(size: str, device: torch.device, rows: int, found: dict[str, list[float]]) -> str:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        f"# pi052, plain path, {size} network, batch {rows}",
        "",
        f"Hardware: {hardware}. torch {torch.__version__}. Commit: {commit or 'unknown'}. "
        f"{NUM_CAMERAS} cameras, {NUM_TOKENS} tokens, {HORIZON} actions, random weights.",
        "",
        "| part | p50 ms | p99 ms |",
        "|---|---|---|",
        *(f"| {name} | {np.percentile(ms, 50):.2f} | {np.percentile(ms, 99):.2f} |" for name, ms in found.items()),
    ]
    if device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(device) / 2**30
        lines += ["", f"Largest memory: {gib:.1f} GiB."]
    if size == "full" and rows == 1:
        others = ", ".join(f"{name} {ms} ms" for name, ms in REFERENCES.items())
        lines += ["", f"The same chunk on one H200, measured earlier: {others}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with device:
        network = Pi052Network(SIZES[arguments.size]).eval()
    written = report(arguments.size, device, arguments.rows, parts(network, device, arguments.rows, arguments.count))
    print(written)
    if arguments.write:
        folder = ROOT / "docs" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{datetime.date.today().isoformat()}-pi052.md").write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
