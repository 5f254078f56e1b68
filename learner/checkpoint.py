"""A run's state on disk, exact: what is read back continues bit for bit.

A checkpoint is a policy folder (policies/checkpoint.py) with the averaged weights, which any service can serve, and beside
it the training state:

    training.safetensors   model/<name>, optimizer/<name>/<key>: raw weights and the optimiser's tensors by parameter name
    training.json          step, samples, elapsed_s, digest of the recipe

Random numbers, learning rate and sampler are functions of the step (schedule.py), so none of them is stored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from manyhands.errors import Corrupt, InvalidInput
from policies import checkpoint as policy_checkpoint
from policies.policy import Policy

from .recipe import Recipe
from .run_folder import RunFolder

TENSORS_FILE = "training.safetensors"
STATE_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is.

    Attributes:
        step: Optimiser steps done.
        samples: Samples the ranks have had together: the sampler's global position.
        elapsed_s: Spent training, over all starts.
    """

    step: int = 0
    samples: int = 0
    elapsed_s: float = 0.0


def recipe_digest(recipe: Recipe, seed: int) -> str:
    return hashlib.sha256(f"{recipe.to_json()}\n{seed}".encode()).hexdigest()


def save(
    folder: RunFolder,
    *,
    position: Position,
    policy: Policy[Any],
    averaged: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    digest: str,
    keep: int,
) -> Path:
    """Writes the checkpoint whole or not at all, then drops the oldest ones beyond keep."""
    path = folder.checkpoint_path(position.step)
    tensors = {f"model/{name}": tensor.detach().contiguous() for name, tensor in policy.state_dict().items()}
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer/{names[id(parameter)]}/{key}"] = value.detach().contiguous()
    with policy_checkpoint.whole_folder(path) as unfinished:
        policy_checkpoint.write(policy, unfinished, tensors=averaged)
        save_file(tensors, unfinished / TENSORS_FILE)
        state_json = {"step": position.step, "samples": position.samples, "elapsed_s": position.elapsed_s, "digest": digest}
        (unfinished / STATE_FILE).write_text(json.dumps(state_json) + "\n")
    for step in folder.checkpoint_steps()[:-keep]:
        shutil.rmtree(folder.checkpoint_path(step), ignore_errors=True)
    return path


def load(
    path: Path,
    *,
    policy: Policy[Any],
    optimizer: torch.optim.Optimizer,
    digest: str,
) -> tuple[Position, dict[str, torch.Tensor]]:
    """Fills policy and optimizer; returns the position and the averaged weights.

    Raises:
        InvalidInput: The checkpoint is of another recipe or seed, or a tensor does not fit; names it.
        Corrupt: A file cannot be read.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text())
        with safetensors.safe_open(path / TENSORS_FILE, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise Corrupt(f"{path} cannot be read: {error}; remove it to resume from an older one", field="checkpoint") from None
    if state["digest"] != digest:
        raise InvalidInput(
            f"{path} was written with another recipe or seed; give the run another run_id", field="run.run_id"
        )
    policy_checkpoint.load_tensors(
        policy, {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    )
    policy_tensors = policy.state_dict()
    for name, parameter in policy.named_parameters():
        prefix = f"optimizer/{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}
    position = Position(step=state["step"], samples=state["samples"], elapsed_s=state["elapsed_s"])
    averaged = policy_checkpoint.read_tensors(path)
    return position, {name: tensor.to(policy_tensors[name].device) for name, tensor in averaged.items()}
