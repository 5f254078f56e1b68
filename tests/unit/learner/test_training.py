"""The loop alone, without Ray or a store: exact resume, averaged weights, bounds, decisions of rank 0."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import checkpoint, schedule
from learner.ranks import Ranks
from learner.recipe import Recipe
from learner.recipes import build_recipe
from learner.run_folder import RunFolder
from learner.train import Hooks, Meter, TrainingDiverged, train
from manyhands.errors import Corrupt, InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint as policy_checkpoint
from policies import rows
from policies.normalization import compute_statistics
from policies.policy import Sample
from policies.schedule import PRESETS, Schedule

SPEC = Spec(
    observation=(Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(3,)),),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=10.0,
)
NUM_FRAMES = 50
RECIPE = Recipe(
    policy_type="flow",
    policy_config={"width": 16, "num_blocks": 1, "horizon": 4},
    batch_size=8,
    learning_rate=1e-3,
    schedule=Schedule(warmup_steps=5, decay_steps=40, final_share=0.05),
    max_steps=40,
    save_interval_s=1e9,
    report_every_steps=10,
)


class Memory:
    """Batches of a small made-up dataset."""

    def __init__(self, policy):
        rng = np.random.default_rng(0)
        state = rng.normal(size=(NUM_FRAMES, 3)).astype(np.float32)
        actions = np.repeat(state[:, None, :2], 4, axis=1)
        statistics = {"observation.state": compute_statistics(state), "action": compute_statistics(actions)}
        policy.set_statistics(statistics)
        samples = [
            Sample(observation={"observation.state": s}, task="go", actions=a, is_pad=np.zeros(4, np.bool_))
            for s, a in zip(state, actions, strict=True)
        ]
        self.inputs = policy.preprocess(samples, torch.device("cpu"))
        self.asked: list[list[int]] = []

    def get(self, indices, upcoming):
        self.asked.append(indices.tolist())
        return rows.select(self.inputs, torch.from_numpy(indices))


class Log:
    """Hooks that remember, with a clock that moves when told."""

    def __init__(self, *, seconds_per_look=0.0, stop_at=None):
        self.started: list[int] = []
        self.reported: list[tuple[int, dict[str, float]]] = []
        self.saved: list[int] = []
        self.now = 0.0
        self.looks = 0
        self._seconds_per_look = seconds_per_look
        self._stop_at = stop_at

    def hooks(self) -> Hooks:
        return Hooks(
            started=self.started.append,
            report=lambda step, metrics: self.reported.append((step, metrics)),
            saved=lambda step, averaged, metrics: self.saved.append(step),
            should_stop=self._should_stop,
            clock=self._clock,
        )

    def _clock(self):
        self.now += self._seconds_per_look
        return self.now

    def _should_stop(self):
        self.looks += 1
        return self._stop_at is not None and self.looks > self._stop_at


def run(path, *, recipe=RECIPE, seed=3, max_steps=None, max_duration_s=0.0, log=None, spoil=None, ranks=Ranks()):  # noqa: B008
    torch.manual_seed(seed)
    policy = policy_checkpoint.build(recipe.policy_type, recipe.policy_config, SPEC)
    batches = Memory(policy)
    if spoil:
        spoil(policy, batches)
    position = train(
        recipe=recipe,
        seed=seed,
        max_steps=max_steps or recipe.max_steps,
        max_duration_s=max_duration_s,
        policy=policy,
        batches=batches,
        num_frames=NUM_FRAMES,
        ranks=ranks,
        folder=RunFolder(path),
        hooks=(log or Log()).hooks(),
    )
    return position, policy, batches


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = RunFolder(path).newest_checkpoint()
    assert newest is not None
    return {**load_file(newest / "training.safetensors"), **load_file(newest / "model.safetensors")}


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = all_tensors(first), all_tensors(second)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def test_stopping_and_going_on_changes_no_bit(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=17)
    log = Log()
    position, _, batches = run(tmp_path / "parts", log=log)
    assert log.started == [17]
    assert len(batches.asked) == 40 - 17
    assert position.step == 40
    assert position.samples == 40 * 8
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_stop_that_is_asked_for_leaves_a_checkpoint_to_go_on_from(tmp_path):
    run(tmp_path / "whole")
    log = Log(stop_at=9)
    run(tmp_path / "parts", log=log)
    assert log.saved == [9]
    run(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_another_seed_is_another_run(tmp_path):
    run(tmp_path / "a", max_steps=3)
    run(tmp_path / "b", max_steps=3, seed=4)
    assert any(not torch.equal(t, all_tensors(tmp_path / "b")[n]) for n, t in all_tensors(tmp_path / "a").items())


def test_every_sample_comes_once_an_epoch(tmp_path):
    _, _, batches = run(tmp_path, max_steps=25)
    seen = [index for batch in batches.asked for index in batch]
    for epoch in range(4):
        assert sorted(seen[epoch * NUM_FRAMES : (epoch + 1) * NUM_FRAMES]) == list(range(NUM_FRAMES))


def test_killed_in_the_middle_it_goes_on_to_the_same_bits(tmp_path):
    """kill -9 of a real process; whatever it was writing, the newest whole checkpoint counts."""
    slow = dataclasses.replace(RECIPE, max_steps=400, save_interval_s=0.01, keep_checkpoints=2)
    run(tmp_path / "whole", recipe=slow)
    script = (
        "import dataclasses, sys, time\n"
        "from pathlib import Path\n"
        "from tests.unit.learner.test_training import RECIPE, Log, run\n"
        "slow = dataclasses.replace(RECIPE, max_steps=400, save_interval_s=0.01, keep_checkpoints=2)\n"
        "log = Log()\n"
        "log._clock = time.monotonic\n"
        "run(Path(sys.argv[1]), recipe=slow, log=log)\n"
    )
    parts = RunFolder(tmp_path / "parts")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(parts.path)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (steps := parts.checkpoint_steps()) or steps[-1] < 50:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = parts.checkpoint_steps()[-1]
    assert killed_at < 400
    log = Log()
    run(parts.path, recipe=slow, log=log)
    assert log.started == [killed_at]
    assert_same(tmp_path / "whole", parts.path)


def test_time_ends_a_run_and_the_rate_follows_the_clock(tmp_path):
    log = Log(seconds_per_look=0.5)
    recipe = dataclasses.replace(
        RECIPE, max_steps=10_000, report_every_steps=1, schedule=Schedule(warmup_steps=1, final_share=0.05)
    )
    position, _, _ = run(tmp_path, recipe=recipe, max_duration_s=30.0, log=log)
    assert position.elapsed_s >= 30.0
    assert position.step < 100
    rates = [metrics["train/lr"] for _, metrics in log.reported]
    assert rates[-1] < 0.1 * max(rates)
    again = Log()
    run(tmp_path, recipe=recipe, max_duration_s=30.0, log=again)
    assert again.started == [position.step]
    assert again.saved == [], "the time was over already"


def test_checkpoints_come_with_time_and_old_ones_go(tmp_path):
    recipe = dataclasses.replace(RECIPE, save_interval_s=5.0, keep_checkpoints=2)
    log = Log(seconds_per_look=0.5)
    run(tmp_path, recipe=recipe, log=log)
    assert len(log.saved) >= 4
    assert RunFolder(tmp_path).checkpoint_steps() == log.saved[-2:]


def test_a_checkpoint_is_a_policy_with_averaged_weights(tmp_path):
    _, policy, _ = run(tmp_path)
    newest = RunFolder(tmp_path).newest_checkpoint()
    assert newest is not None
    served = policy_checkpoint.load(newest)
    assert torch.equal(served.state_normalizer.first, policy.state_normalizer.first)
    assert not torch.equal(served.chunk_in.weight, policy.chunk_in.weight)
    assert (served.chunk_in.weight - policy.chunk_in.weight).abs().max() < 0.05


def test_it_learns(tmp_path):
    log = Log()
    schedule = Schedule(warmup_steps=5, decay_steps=300, final_share=0.05)
    run(tmp_path, recipe=dataclasses.replace(RECIPE, max_steps=300, learning_rate=3e-3, schedule=schedule), log=log)
    assert log.reported[-1][1]["train/loss"] < 0.5 * log.reported[0][1]["train/loss"]


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_step(tmp_path):
    def spoil(policy, batches):
        batches.inputs.actions[:] = float("nan")

    with pytest.raises(TrainingDiverged, match="step 0"):
        run(tmp_path, spoil=spoil)
    assert RunFolder(tmp_path).checkpoint_steps() == []


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(tmp_path, max_steps=3)
    with pytest.raises(InvalidInput, match="run_id"):
        run(tmp_path, recipe=dataclasses.replace(RECIPE, learning_rate=1e-4))


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, max_steps=3)
    newest = RunFolder(tmp_path).newest_checkpoint()
    assert newest is not None
    path = newest / checkpoint.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Corrupt, match="step-000000003"):
        run(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_on_a_gpu_it_goes_on_to_the_same_bits_too(tmp_path, decay):
    ranks = Ranks(device=torch.device("cuda"))
    mixed = dataclasses.replace(RECIPE, mixed_precision=True, ema_decay=decay)
    run(tmp_path / "whole", recipe=mixed, ranks=ranks)
    run(tmp_path / "parts", recipe=mixed, max_steps=17, ranks=ranks)
    _, policy, _ = run(tmp_path / "parts", recipe=mixed, ranks=ranks)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert {parameter.device.type for parameter in policy.parameters()} == {"cuda"}


def test_a_term_is_averaged_over_the_samples_that_have_it():
    meter = Meter(lambda: 0.0)
    for flow, text in (([1.0, 0.0], [0.0, 4.0]), ([2.0, 3.0], [0.0, 0.0])):
        terms = {"flow": torch.tensor(flow), "text": torch.tensor(text), "fast": torch.zeros(2)}
        meter.add(loss=1.0, terms=terms, norm=1.0, rate=1.0, samples=2)
    metrics = meter.read(2, reset=True)
    assert (metrics["train/loss_flow"], metrics["train/loss_text"]) == (2.0, 4.0)
    assert "train/loss_fast" not in metrics
    meter.add(loss=1.0, terms={"flow": torch.tensor([7.0])}, norm=1.0, rate=1.0, samples=1)
    assert meter.read(3)["train/loss_flow"] == 7.0, "since the reset"


def test_without_an_average_the_raw_weights_are_the_checkpoint_and_go_on(tmp_path):
    raw = dataclasses.replace(RECIPE, ema_decay=0.0)
    run(tmp_path / "whole", recipe=raw)
    run(tmp_path / "parts", recipe=raw, max_steps=17)
    run(tmp_path / "parts", recipe=raw)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    tensors = all_tensors(tmp_path / "whole")
    assert torch.equal(tensors["chunk_in.weight"], tensors["model/chunk_in.weight"])


class TestSchedule:
    def test_warm_up_then_cosine(self):
        rates = [schedule.learning_rate(RECIPE, step=step, elapsed_s=0, max_duration_s=0) for step in range(41)]
        assert rates[0] == pytest.approx(1e-3 / 6, rel=0.01)
        assert max(rates) == rates[5]
        assert rates[40] == pytest.approx(0.05 * 1e-3)
        assert rates[5:] == sorted(rates[5:], reverse=True)

    def test_whichever_of_steps_and_time_is_further_counts(self):
        def at(step, elapsed_s):
            return schedule.learning_rate(RECIPE, step=step, elapsed_s=elapsed_s, max_duration_s=10.0)

        half = 1e-3 * (0.05 + 0.95 * 0.5)
        assert at(20, 1.0) == pytest.approx(half)
        assert at(10, 5.0) == pytest.approx(half)
        assert at(10, 80.0) == pytest.approx(0.05 * 1e-3)

    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_recipes_of_published_policies_have_their_rates(self, name):
        """Steps 0, 500, 1000 and 30000 as lerobot's scheduler gives them."""
        recipe, preset = build_recipe(name), PRESETS[name]

        def rate(step):
            return schedule.learning_rate(recipe, step=step, elapsed_s=0.0, max_duration_s=0.0)

        peak = {"pi05": 2.5e-5, "pi052": 2.5e-5, "smolvla": 1e-4, "smolvla2": 2.5e-5}[name]
        last = 2.5e-6
        assert rate(0) == pytest.approx(peak / 1001)
        assert rate(500) == pytest.approx(peak * (1 / 1001 + (1 - 1 / 1001) * 0.5))
        assert rate(1000) == pytest.approx(last + (peak - last) * 0.5 * (1 + np.cos(np.pi / 30)))
        assert rate(30_000) == rate(40_000) == pytest.approx(last)
        assert (recipe.weight_decay, recipe.max_grad_norm) == (preset.weight_decay, preset.max_grad_norm)
        assert (recipe.betas, recipe.epsilon, recipe.ema_decay) == ((0.9, 0.95), 1e-8, 0.0)

    def test_seeds_differ_by_run_step_and_rank(self):
        seeds = {schedule.step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(3)}
        assert len(seeds) == 450
        assert all(0 <= seed < 2**63 for seed in seeds)
