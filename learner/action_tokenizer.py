"""The FAST tokenizer of a run: fitted on its data, kept by content, part of the policy's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manyhands.errors import InvalidInput
from policies import fast_fitting
from policies import files as policy_files
from policies.fast_fitting import FitSettings, ToModelSpace
from policies.normalization import to_relative
from policies.policy import Policy
from policies.prompted import PromptedPolicy

from .data import Demonstrations


class Chunks:
    """Demonstrations as policies.fast_fitting.ChunkSource."""

    def __init__(self, demonstrations: Demonstrations) -> None:
        self._demonstrations = demonstrations
        self._ranges = demonstrations.episode_ranges()

    @property
    def episode_lengths(self) -> list[int]:
        return [len(frames) for frames in self._ranges]

    def chunk(
        self, episode: int, start: int, horizon: int
    ) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.floating[Any]]]:
        first = self._ranges[episode].start + start
        return self._demonstrations.actions[first : first + horizon], self._demonstrations.states[first]


def fit(policy: Policy[Any], demonstrations: Demonstrations, settings: FitSettings, *, cache: Path, is_leader: bool) -> None:
    """Gives policy, whose statistics are set, a tokenizer of the data's chunks as its loss sees them.

    One rank leads; the others wait for it.

    Raises:
        InvalidInput: The policy learns no FAST tokens, or the tokenizer is outside the limits of settings.
    """
    if not isinstance(policy, PromptedPolicy) or not getattr(policy.config, "fast_weight", 0.0) > 0:
        raise InvalidInput(
            f"is set, but this policy of type {policy.type_name!r} learns no FAST tokens; leave it out",
            field="recipe.fit_fast",
        )
    tokenizer, _ = fast_fitting.cached(
        cache,
        _key(policy, demonstrations, settings),
        lambda: fast_fitting.fit(Chunks(demonstrations), policy.horizon, to_model_space(policy), settings),
        is_leader=is_leader,
    )
    names = (policy_files.ACTION_TOKENIZER, policy_files.ACTION_TOKENIZER_CONFIG)
    policy.take_files({**policy.files, **dict(zip(names, tokenizer.contents(), strict=True))})


def to_model_space(policy: PromptedPolicy[Any, Any]) -> ToModelSpace:
    """(T, R) actions and (S,) state in the robot's units to (T, R) as the loss has them, relative where the policy is."""
    mask = policy.relative_action_mask()
    size = policy.robot_action_size

    def convert(
        actions: npt.NDArray[np.floating[Any]], state: npt.NDArray[np.floating[Any]]
    ) -> npt.NDArray[np.floating[Any]]:
        chunk = torch.from_numpy(np.asarray(actions, np.float32))[None]
        if mask is not None:
            anchor = np.zeros((1, size), np.float32)
            anchor[0, : min(size, len(state))] = state[:size]
            chunk = to_relative(chunk, torch.from_numpy(anchor), torch.from_numpy(mask))
        converted: npt.NDArray[np.float32] = policy.action_normalizer.normalize(chunk)[0].numpy()
        return converted

    return convert


def _key(policy: PromptedPolicy[Any, Any], demonstrations: Demonstrations, settings: FitSettings) -> str:
    mask = policy.relative_action_mask()
    return fast_fitting.content_key(
        {
            "data": demonstrations.digest.hex(),
            "episodes": [len(frames) for frames in demonstrations.episode_ranges()],
            "horizon": policy.horizon,
            "actions": [[feature.name, *feature.shape] for feature in policy.spec.action],
            "normalization": policy.config.action_normalization.value,
            "statistics": {name: tensor.numpy() for name, tensor in policy.action_normalizer.state_dict().items()},
            "relative": None if mask is None else mask,
            "settings": dataclasses.asdict(settings),
        }
    )
