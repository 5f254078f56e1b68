"""The training loop, readable top to bottom.

One call is one worker's share of a run, from its newest checkpoint to its end. It knows neither Ray nor gRPC: what it needs
comes as arguments, so that a test runs it as it is.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dataset_store.sampler import Sampler
from manyhands.errors import Refused
from policies import rows
from policies.policy import Policy

from . import checkpoint, schedule
from .checkpoint import Position
from .data import Batches
from .ranks import Ranks
from .recipe import Recipe
from .run_folder import RunFolder

Metrics = dict[str, float]


class TrainingDiverged(Refused):
    """The loss is not a number any more."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop tells, on rank 0 only.

    Attributes:
        started: With the step that training goes on from.
        report: Every report_every_steps, and at the end.
        saved: After each checkpoint, with the averaged weights, which later steps change.
        should_stop: Asked before every step.
        clock: Seconds, monotonic.
    """

    started: Callable[[int], None]
    report: Callable[[int, Metrics], None]
    saved: Callable[[int, dict[str, torch.Tensor], Metrics], None]
    should_stop: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic


def train(
    *,
    recipe: Recipe,
    seed: int,
    max_steps: int,
    max_duration_s: float,
    policy: Policy[Any],
    batches: Batches,
    num_frames: int,
    ranks: Ranks,
    folder: RunFolder,
    hooks: Hooks,
) -> Position:
    """Trains policy until max_steps, max_duration_s (0: no bound) or should_stop; leaves a checkpoint of the last step.

    Raises:
        TrainingDiverged: The loss became infinite or NaN; the checkpoints up to then stay.
    """
    policy.to(ranks.device)
    model = ranks.wrap(policy.train())
    optimizer = make_optimizer(recipe, policy)
    digest = checkpoint.recipe_digest(recipe, seed)
    position, averaged = Position(), clone(policy.state_dict()) if recipe.ema_decay else policy.state_dict()
    if (newest := folder.newest_checkpoint()) is not None:
        position, saved = checkpoint.load(newest, policy=policy, optimizer=optimizer, digest=digest)
        averaged = saved if recipe.ema_decay else averaged
    if ranks.is_first:
        hooks.started(position.step)

    sampler = Sampler(num_frames=num_frames, seed=seed, rank=ranks.rank, world_size=ranks.world_size)
    rank_batch = max(1, recipe.batch_size // ranks.world_size)
    started_s = hooks.clock() - position.elapsed_s
    meter = Meter(hooks.clock)
    saved_step, saved_s = position.step, position.elapsed_s
    samples = position.samples
    step = position.step
    while True:
        elapsed_s = hooks.clock() - started_s
        is_over = step >= max_steps or (0 < max_duration_s <= elapsed_s) or (ranks.is_first and hooks.should_stop())
        is_over, save_due = ranks.agree(is_over, elapsed_s - saved_s >= recipe.save_interval_s)

        if (is_over or save_due) and step > saved_step:
            if ranks.is_first:
                here = Position(step=step, samples=samples, elapsed_s=elapsed_s)
                arguments = {"policy": policy, "averaged": averaged, "optimizer": optimizer, "digest": digest}
                checkpoint.save(folder, position=here, keep=recipe.keep_checkpoints, **arguments)  # type: ignore[arg-type]
                hooks.saved(step, averaged, meter.read(step))
            ranks.barrier()
            saved_step, saved_s = step, elapsed_s
        if is_over:
            if ranks.is_first and step % recipe.report_every_steps:
                hooks.report(step, meter.read(step))
            return Position(step=step, samples=samples, elapsed_s=elapsed_s)

        inputs = batches.get(
            sampler.batch(samples, rank_batch), sampler.batch(samples + rank_batch * ranks.world_size, rank_batch)
        )
        rate = schedule.learning_rate(recipe, step=step, elapsed_s=elapsed_s, max_duration_s=max_duration_s)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        generator = torch.Generator().manual_seed(schedule.step_seed(seed, step, ranks.rank))
        torch.manual_seed(schedule.step_seed(seed, step, ranks.rank))  # For layers that draw by themselves, as dropout.

        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.mixed_precision and ranks.on_gpu):
            losses = model(rows.to_device(inputs, ranks.device), generator)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), recipe.max_grad_norm)
        loss_value = float(losses.total.detach())
        if not math.isfinite(loss_value) or not bool(torch.isfinite(norm)):
            raise TrainingDiverged(
                f"loss is {loss_value} with gradient norm {float(norm)} at step {step}; "
                f"lower recipe.learning_rate ({rate:.2g} at this step)"
            )
        optimizer.step()
        if recipe.ema_decay:
            average(averaged, policy.state_dict(), schedule.ema_decay(recipe, step))

        step += 1
        samples += rank_batch * ranks.world_size
        meter.add(loss=loss_value, terms=losses.terms, norm=float(norm), rate=rate, samples=rank_batch * ranks.world_size)
        if ranks.is_first and step % recipe.report_every_steps == 0:
            hooks.report(step, meter.read(step, reset=True))


def make_optimizer(recipe: Recipe, policy: Policy[Any]) -> torch.optim.Optimizer:
    """AdamW over the policy's groups; each keeps its lr_scale, the loop sets the rates."""
    groups = [
        {"params": list(group.parameters), "lr": recipe.learning_rate * group.lr_scale, "lr_scale": group.lr_scale}
        for group in policy.parameter_groups()
    ]
    on_gpu = all(parameter.is_cuda for parameter in policy.parameters())
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay, fused=on_gpu)


def clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def average(averaged: dict[str, torch.Tensor], present: dict[str, torch.Tensor], decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * present; what is not a floating-point tensor is copied."""
    floating = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([averaged[name] for name in floating], [present[name] for name in floating], 1.0 - decay)
    for name in averaged.keys() - set(floating):
        averaged[name].copy_(present[name])


class Meter:
    """Means since the last reset."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rows: list[tuple[float, float, int]] = []
        self._terms: dict[str, list[float]] = defaultdict(list)
        self._rate = 0.0
        self._started_s = clock()
        self._last: Metrics = {}

    def add(self, *, loss: float, terms: Mapping[str, torch.Tensor], norm: float, rate: float, samples: int) -> None:
        """terms: (B,) each, unweighted, 0 for samples that have no part in it."""
        self._rows.append((loss, norm, samples))
        self._rate = rate
        for name, values in terms.items():
            self._terms[name] += [value for value in values.detach().tolist() if value != 0.0]

    def read(self, step: int, *, reset: bool = False) -> Metrics:
        """Of the steps since the last reset, or those before it where there are none.

        A term's mean is over the samples that have it, so it does not move with how many do.
        """
        if not self._rows:
            return self._last | {"train/step": float(step)}
        losses, norms, samples = zip(*self._rows, strict=True)
        metrics = {
            "train/step": float(step),
            "train/loss": sum(losses) / len(losses),
            **{f"train/loss_{name}": sum(values) / len(values) for name, values in self._terms.items() if values},
            "train/grad_norm": sum(norms) / len(norms),
            "train/lr": self._rate,
            "train/samples_per_s": sum(samples) / max(self._clock() - self._started_s, 1e-9),
        }
        if reset:
            self._last, self._rows, self._started_s = metrics, [], self._clock()
            self._terms.clear()
        return metrics
