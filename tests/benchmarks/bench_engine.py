"""The fast path of pi052 on one GPU, unit by unit, beside the floor of its matrix products, and the plain module in the same
run: as it is, and with its layers compiled and a chunk as one graph.

python -m tests.benchmarks.bench_engine                  needs a CUDA device
python -m tests.benchmarks.bench_engine --fp8            also prefixes and whole chunks with the prefix's MLPs in FP8
python -m tests.benchmarks.bench_engine --write          also writes docs/benchmarks/<date>-engine.md

Full size, random weights, bfloat16; three cameras at 224, 200 prompt tokens, 50 actions, 10 steps. Units are timed by events
on the device around one replay of their graph; whole chunks by the host's clock from the call to the chunk in host memory.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from policies.pi052.config import NetworkConfig, Precision  # noqa: E402
from policies.pi052.model import Pi052Network  # noqa: E402
from services.inference.fused import FusedPi052, FusedSettings, PrefixRow, TextRow  # noqa: E402
from services.inference.units import expert_sizes  # noqa: E402
from tests.benchmarks.engine_ruler import Batch, Captured, chunks, compile_layers  # noqa: E402
from tests.support import fused_lab as lab  # noqa: E402

CONFIG = NetworkConfig(precision=Precision.BFLOAT16)
NUM_CAMERAS, NUM_TOKENS, HORIZON, NUM_STEPS = 3, 200, 50, 10
CHUNKS = {"whole chunk, 1 row": 1, "8 chunks together": 8}
# Of the plain module in float32, which takes long.
NUM_EXACT_CHUNKS = 3
# One H200, in ms, of the matrix products alone: the larger of FLOPs / 790 TFLOP/s and bytes / 4.3 TB/s.
FLOORS = {"vision, 1 row": 0.85, "prefix, 1 row": 5.0, "expert step, 1 row": 0.163, "text step, 1 row": 1.17}
FLOORS |= {"whole chunk, 1 row": 7.5, "8 chunks together": 51.0, "expert step, 8 rows": 0.39, "text step, 32 rows": 1.32}
# Of a plain-PyTorch program, measured earlier on such a card: as engine_ruler.py, with matrices fused and norms prepared.
RULER = {
    "vision, 1 row": 2.5,
    "prefix, 1 row": 7.3,
    "expert step, 1 row": 1.35,
    "whole chunk, 1 row": 22.6,
    "8 chunks together": 86.0,
}

Times = dict[str, list[float]]


def device_ms(run: Callable[[], object], count: int) -> list[float]:
    found = []
    for index in range(count + 3):
        torch.cuda._sleep(1_000_000)  # The host launches meanwhile, as when it runs ahead of the device.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            found.append(begin.elapsed_time(end))
    return found


def host_ms(run: Callable[[], object], count: int, pause_s: float = 0.05) -> list[float]:
    """With a pause before each, as of robots that replan: without one the card reaches its power limit and slows down."""
    found = []
    for index in range(count + 3):
        torch.cuda.synchronize()
        time.sleep(pause_s)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if index >= 3:
            found.append((time.perf_counter() - begin) * 1e3)
    return found


def units(fused: FusedPi052, asked: list[lab.Request], count: int) -> Times:
    slots = [slot for at in range(0, 16, 4) for slot in lab.begin(fused, asked[at : at + 4])]
    found: Times = {}
    for rows in fused.settings.prefix_rows:
        found[f"vision, {_rows(rows)}"] = device_ms(fused._bucket("vision_of_bytes", rows, 0).run, count)
    found |= prefixes(fused, asked, count)
    for rows in fused.settings.expert_rows:
        fused.expert_step([(slot, 0) for slot in slots[:rows]])
        found[f"expert step, {_rows(rows)}"] = device_ms(fused._bucket("expert_step", rows, 0).run, count)
    for rows in fused.settings.text_rows:
        fused.first_text([TextRow(slot=slot, flags=0) for slot in slots[:rows]])
        fused.text_step([TextRow(slot=slots[row % len(slots)], flags=0) for row in range(rows)])
        found[f"text step, {_rows(rows)}"] = device_ms(fused._bucket("text_step", rows, 0).run, min(count, 20))
    for slot in slots:
        fused.slots.give_back(slot)
    return found


def prefixes(fused: FusedPi052, asked: list[lab.Request], count: int) -> Times:
    found: Times = {}
    for rows in fused.settings.prefix_rows:
        for slot in lab.begin(fused, asked[:rows]):  # Of real numbers: the card takes less power for zeros.
            fused.slots.give_back(slot)
        found[f"prefix, {_rows(rows)}"] = device_ms(fused._bucket("prefix", rows, NUM_TOKENS).run, count)
    return found


def whole(fused: FusedPi052, asked: list[lab.Request], count: int) -> Times:
    """From pictures on the host, as bytes, to chunks on the host."""
    pictures = [[to_bytes(picture) for picture in one.pictures] for one in asked]
    starts = [lab.start(one) for one in asked]

    def answer(rows: int, together: int) -> torch.Tensor:
        """By the units that the service runs: vision and prefixes of so many together, Euler steps of all rows."""
        for at in range(0, rows, together):
            group = range(at, at + together)
            tokens = fused.vision_of_bytes([picture for row in group for picture in pictures[row]])
            fused.prefix([
                PrefixRow(slot=row, picture_tokens=seen, picture_valid=asked[row].picture_valid, tokens=asked[row].tokens)
                for row, seen in zip(group, tokens.chunk(together), strict=True)
            ])  # fmt: skip
            fused.begin_chunks([(row, starts[row]) for row in group])
        for step in range(NUM_STEPS):
            fused.expert_step([(row, step) for row in range(rows)])
        return fused.slots.actions[:rows].cpu()

    return {
        "whole chunk, 1 row": host_ms(lambda: answer(1, 1), count),
        "8 chunks together": host_ms(lambda: answer(8, 4), count),
        "8 chunks together, no pause": host_ms(lambda: answer(8, 4), count, 0.0),
        "8 chunks, prefixes by twos": host_ms(lambda: answer(8, 2), count),
        "8 chunks, prefixes by twos, no pause": host_ms(lambda: answer(8, 2), count, 0.0),
    }


@torch.inference_mode()
def plain(network: Pi052Network, asked: list[lab.Request], count: int) -> Times:
    """The module as it is, of one request and of eight in a batch; prompts of one length."""
    device = network.action_in.weight.device

    def answer(batch: Batch) -> torch.Tensor:
        return chunks(network, batch.to(device), NUM_STEPS).cpu()

    return {name: host_ms(partial(answer, Batch.of(asked[:rows])), count) for name, rows in CHUNKS.items()}


@torch.inference_mode()
def compiled(network: Pi052Network, asked: list[lab.Request], exact: Exact, count: int) -> tuple[Times, str]:
    """Times of the module with its layers compiled, one graph a chunk, and a note of its error. It stays changed."""
    compile_layers(network)
    found: Times = {}
    largest = 0.0
    for name, rows in CHUNKS.items():
        batch = Batch.of(asked[:rows]).pinned()
        answer = partial(Captured(network, batch, NUM_STEPS), batch)
        pairs = zip(answer(), exact.chunks, strict=False)
        largest = max(largest, *(lab.relative(chunk, expected.cpu()) for chunk, expected in pairs))
        found[name] = host_ms(answer, count)
        found[f"{name}, no pause"] = host_ms(answer, count, 0.0)
    return found, f"Compiled module in bfloat16, vision too: chunk {largest:.1e}."


@dataclass(frozen=True, kw_only=True)
class Exact:
    """What the plain module in float32 answers.

    Attributes:
        chunks: Of the first few requests.
        logits: Of the first text token of every request, (V,).
    by_prefix: By how much, relatively, the first chunk changes with the pictures and the prompt of the second request: what
        errors of a prefix are to be held against, since an untrained expert hardly looks at it.
    """

    chunks: list[torch.Tensor]
    logits: list[torch.Tensor]
    by_prefix: float


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Attributes:
    chunk: Largest relative one.
    logits: Largest relative one, of tokens that may come.
    num_same: Requests whose likeliest first token is that of float32.
    """

    chunk: float
    logits: float
    num_same: int


@torch.inference_mode()
def exact_answers(network: Pi052Network, asked: list[lab.Request], num_chunks: int) -> Exact:
    made = lab.network(replace(CONFIG, precision=Precision.FLOAT32), device=network.action_in.weight.device)
    made.load_state_dict({name: value.float() for name, value in network.state_dict().items()})
    logits = []
    for one in asked:
        state = lab.plain_state(made, one, hidden=True)
        assert state.hidden is not None
        logits.append(made.text_logits(state.hidden[:, -1])[0])
    chunks = [lab.plain_chunk(made, one, NUM_STEPS) for one in asked[:num_chunks]]
    other = lab.plain_chunk(made, replace(asked[0], pictures=asked[1].pictures, tokens=asked[1].tokens), NUM_STEPS)
    return Exact(chunks=chunks, logits=logits, by_prefix=lab.relative(other, chunks[0]))


def errors(fused: FusedPi052, asked: list[lab.Request], exact: Exact) -> Errors:
    of_chunks, of_logits, num_same = [], [], 0
    allowed = ~fused.units.forbidden[0]
    for index, one in enumerate(asked):
        [slot] = lab.begin(fused, [one])
        expected = exact.logits[index][allowed]
        logits = fused.first_text([TextRow(slot=slot, flags=0)])[0][0, allowed]
        of_logits.append(lab.relative(logits, expected))
        num_same += int(logits.argmax() == expected.argmax())
        if index < len(exact.chunks):
            for step in range(NUM_STEPS):
                fused.expert_step([(slot, step)])
            of_chunks.append(lab.relative(fused.slots.actions[slot], exact.chunks[index]))
        fused.slots.give_back(slot)
    return Errors(chunk=max(of_chunks), logits=max(of_logits), num_same=num_same)


def plain_error(network: Pi052Network, asked: list[lab.Request], exact: Exact) -> float:
    """The largest relative one of a chunk of the plain module in bfloat16."""
    pairs = zip(asked, exact.chunks, strict=False)
    return max(lab.relative(lab.plain_chunk(network, one, NUM_STEPS), expected) for one, expected in pairs)


def in_fp8(
    network: Pi052Network, settings: FusedSettings, asked: list[lab.Request], exact: Exact, count: int
) -> tuple[Times, str]:
    """Times of what FP8 changes, and a note of what it costs."""
    fused = FusedPi052(CONFIG, replace(settings, fp8=True), network.action_in.weight.device)
    fused.weights.refill(network.state_dict())
    found = errors(fused, asked, exact)
    times = {f"{name}, fp8": ms for name, ms in (prefixes(fused, asked, count) | whole(fused, asked, count)).items()}
    return times, f"With FP8: {_told(found, len(asked))} Weights: {fused.weights.num_bytes / 1e9:.2f} GB."


def _told(found: Errors, num_asked: int) -> str:
    return (
        f"relative error of a chunk {found.chunk:.1e}, of the logits of the first text token, which the prefix alone makes, "
        f"{found.logits:.1e}; the likeliest token is that of float32 in {found.num_same} of {num_asked} requests."
    )


def to_bytes(picture: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(3, height, width) in [-1, 1] to (height, width, 3), in one piece as cameras give it."""
    return ((picture.permute(1, 2, 0) + 1.0) * 127.5).round().to(torch.uint8).contiguous().numpy()


def _rows(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def report(found: Times, of_plain: Times, of_compiled: Times, notes: list[str], commit: str) -> str:
    lines = [
        "# The fused engine of pi052, full network",
        "",
        f"Hardware: {torch.cuda.get_device_name()}. torch {torch.__version__}. Commit: {commit}. "
        f"{NUM_CAMERAS} cameras at 224, {NUM_TOKENS} prompt tokens, {HORIZON} actions, {NUM_STEPS} steps, bfloat16, "
        "random weights with random norms.",
        "",
        "| unit | p50 ms | p99 ms | floor | ruler, measured earlier | plain module, compiled, one graph, this run "
        "| plain module, this run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ms in found.items():
        here = [np.percentile(times[name], 50) if name in times else None for times in (of_compiled, of_plain)]
        others = [FLOORS.get(name), RULER.get(name), *here]
        cells = " | ".join("-" if value is None else f"{value:.3g}" for value in others)
        lines.append(f"| {name} | {np.percentile(ms, 50):.3f} | {np.percentile(ms, 99):.3f} | {cells} |")
    rate, steady = (8e3 / float(np.percentile(found[f"8 chunks together{how}"], 50)) for how in ("", ", no pause"))
    lines += [
        "",
        f"8 robots together: {rate:.1f} chunks/s, {steady:.1f} without a pause (floor 157, ruler 92). "
        "Whole chunks are host to host, pictures and actions copied; vision and prefix run four rows at a time, or two.",
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--commit", default="", help="where the sources lie outside a repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    network = lab.network(CONFIG, device=torch.device("cuda"))
    settings = FusedSettings(
        num_cameras=NUM_CAMERAS,
        prompt_lengths=(NUM_TOKENS,),
        prefix_rows=(1, 2, 4),
        expert_rows=expert_sizes(16),
        text_rows=(1, 8, 16, 32),
        pictures_fit=True,
    )
    fused = FusedPi052(CONFIG, settings, torch.device("cuda"))
    fused.weights.refill(network.state_dict())
    begin = time.perf_counter()
    fused.prepare()
    prepared_s = time.perf_counter() - begin
    asked = [lab.request(CONFIG, seed, NUM_TOKENS, cameras=NUM_CAMERAS, horizon=HORIZON) for seed in range(16)]
    found = units(fused, asked, arguments.count)
    found |= whole(fused, asked, arguments.count)
    found["weight commit"] = device_ms(fused.weights.commit, 10)
    gib = torch.cuda.max_memory_allocated() / 2**30
    of_plain = plain(network, asked, 10)
    exact = exact_answers(network, asked, NUM_EXACT_CHUNKS)
    of_fused, of_bfloat16 = errors(fused, asked, exact), plain_error(network, asked, exact)
    fp8_notes: list[str] = []
    if arguments.fp8:
        fused.weights.free_spare()
        times, note = in_fp8(network, settings, asked, exact, arguments.count)
        found |= times
        fp8_notes = ["", note]
    of_compiled, note = compiled(network, asked, exact, 10)
    notes = [
        f"Largest errors against the plain module in float32. Fused: {_told(of_fused, len(asked))} "
        f"Plain module in bfloat16: chunk {of_bfloat16:.1e}. {note} Another request's "
        f"pictures and prompt change a chunk by {exact.by_prefix:.1e}.",
        "",
        f"Preparing {len(fused._buckets())} graphs took {prepared_s:.1f} s with kernels compiled on the way. Weights: "
        f"{fused.weights.num_bytes / 1e9:.2f} GB, and as much again while a version is staged; "
        f"largest memory {gib:.1f} GiB, the plain module's weights included.",
        *fp8_notes,
    ]
    written = report(found, of_plain, of_compiled, notes, arguments.commit or git.stdout.strip() or "unknown")
    print(written)
    if arguments.write:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / f"{datetime.date.today().isoformat()}-engine.md").write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
