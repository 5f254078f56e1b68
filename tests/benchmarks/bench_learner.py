"""Steps of the training loop with full-size pi052 on a GPU: samples a second and memory, with batches of prepared inputs.

python tests/benchmarks/bench_learner.py --batch-size 8
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from learner.ranks import Ranks
from learner.recipes import build_recipe
from learner.run_folder import RunFolder
from learner.train import Hooks, train
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, rows
from policies.policy import Sample

CAMERAS = tuple(f"observation.images.{name}" for name in ("front", "left", "right"))
SPEC = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(14,)),
        *(Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(224, 224, 3)) for name in CAMERAS),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(14,)),),
    control_rate_hz=30.0,
)
NUM_FRAMES = 64


class Prepared:
    def __init__(self, policy) -> None:
        rng = np.random.default_rng(0)
        statistics = {key: np.full(14, value) for key, value in (("q01", -1.0), ("q99", 1.0), ("mean", 0.0), ("std", 1.0))}
        policy.set_statistics({"observation.state": statistics, "action": statistics})
        samples = [
            Sample(
                observation={
                    "observation.state": rng.normal(size=14).astype(np.float32),
                    **{name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in CAMERAS},
                },
                task="put the cube into the bin on the left",
                actions=rng.normal(size=(policy.horizon, 14)).astype(np.float32) / 3,
                is_pad=np.zeros(policy.horizon, np.bool_),
            )
            for _ in range(NUM_FRAMES)
        ]
        self._inputs = policy.preprocess(samples, torch.device("cpu"))

    def get(self, indices, upcoming):
        return rows.select(self._inputs, torch.from_numpy(indices))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="pi052")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    recipe = build_recipe(arguments.recipe)
    config = {**recipe.policy_config, "byte_prompts": True}
    recipe = dataclasses.replace(
        recipe,
        start_from="",
        policy_config=config,
        batch_size=arguments.batch_size,
        report_every_steps=1,
        save_interval_s=1e9,
    )
    torch.manual_seed(0)
    with device:
        policy = checkpoint.build(recipe.policy_type, recipe.policy_config, SPEC)
    for normalizer in (policy.state_normalizer, policy.action_normalizer):
        normalizer.to("cpu")
    batches = Prepared(policy)
    begun, looks = [], []

    def should_stop() -> bool:
        torch.cuda.synchronize()
        looks.append(time.perf_counter())
        if len(looks) > arguments.steps:
            raise KeyboardInterrupt  # Before a checkpoint of the whole is written.
        return False

    hooks = Hooks(
        started=begun.append,
        report=lambda step, m: print(step, m, flush=True),
        saved=lambda *_: None,
        should_stop=should_stop,
    )
    try:
        train(
            recipe=recipe,
            seed=0,
            max_steps=recipe.max_steps,
            max_duration_s=0.0,
            policy=policy,
            batches=batches,
            num_frames=NUM_FRAMES,
            ranks=Ranks(device=device),
            folder=RunFolder(Path(tempfile.mkdtemp())),
            hooks=hooks,
        )
    except KeyboardInterrupt:
        pass
    steps_s = np.diff(looks)[3:]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    p50, p99 = np.quantile(steps_s, [0.5, 0.99])
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit}, {arguments.recipe}: batch "
        f"{arguments.batch_size}, step p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, {arguments.batch_size / p50:.1f} "
        f"samples/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main()
