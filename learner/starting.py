"""What a run begins with: data, and a policy with weights, tokenizers and the data's statistics."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset_store.reader import DatasetReader
from manyhands.errors import InvalidInput, NotFound
from manyhands.spec import Spec
from policies import checkpoint as policy_checkpoint
from policies import files as policy_files
from policies import loading
from policies.normalization import Normalizer
from policies.policy import Policy

from . import action_tokenizer, messages
from .data import Demonstrations
from .ranks import Ranks
from .recipe import Recipe
from .run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders of a learner, the same on all its machines.

    Attributes:
        checkpoints: Those that recipes start from, by name.
        cache: What any run may use again.
    """

    checkpoints: Path
    cache: Path


@dataclass(frozen=True, kw_only=True)
class Start:
    """notes: For people, about what was decided."""

    demonstrations: Demonstrations
    policy: Policy[Any]
    notes: tuple[str, ...]


def start(snapshot: Path, recipe: Recipe, folder: RunFolder, ranks: Ranks, places: Places) -> Start:
    """Fresh weights come from torch's default generator. Of a run that goes on, configuration, tokenizers and recipe of
    messages are those of its newest checkpoint, so that it needs nothing else than it began with.

    Raises:
        NotFound, Corrupt, InvalidInput: Data, recipe and checkpoint do not fit; says what.
    """
    reader = DatasetReader(snapshot)
    newest = folder.newest_checkpoint()
    notes: tuple[str, ...] = ()
    if newest is not None:
        policy_type, config, _ = policy_checkpoint.read_config(newest)
        policy = policy_checkpoint.build(policy_type, config, reader.spec, policy_files.read(newest))
    elif recipe.start_from:
        policy, notes = from_checkpoint(places.checkpoints / recipe.start_from, recipe, reader.spec)
    else:
        policy = policy_checkpoint.build(recipe.policy_type, recipe.policy_config, reader.spec)
    demonstrations = Demonstrations(reader, horizon=policy.horizon)
    policy.set_statistics(demonstrations.statistics(policy.relative_action_mask()))
    if newest is None:
        notes += messages.check(policy, demonstrations)
        if recipe.fit_fast is not None:
            action_tokenizer.fit(
                policy, demonstrations, recipe.fit_fast, cache=places.cache / "fast", is_leader=ranks.is_first
            )
    for note in notes:
        logger.info("%s", note)
    return Start(demonstrations=demonstrations, policy=policy, notes=notes)


def from_checkpoint(path: Path, recipe: Recipe, spec: Spec) -> tuple[Policy[Any], tuple[str, ...]]:
    """A policy for spec with the type, files, network and configuration of a checkpoint, ours or lerobot's folder, and the
    recipe's keys in place of the configuration's own.

    Raises:
        NotFound: No such checkpoint.
        InvalidInput: It is of another type, or a tensor of its network does not fit; names it.
    """
    if not path.is_dir():
        raise NotFound(
            f"{path} is not there; put the checkpoint there, or start the learner with another --checkpoints",
            field="recipe.start_from",
        )
    origin = loading.load(path)
    if recipe.policy_type not in ("", origin.type_name):
        raise InvalidInput(
            f"is {recipe.policy_type!r}, but {path} holds a policy of type {origin.type_name!r}", field="recipe.policy_type"
        )
    config = overridden(origin.config_dict(), recipe.policy_config)
    policy = policy_checkpoint.build(origin.type_name, config, spec, origin.files)
    take_network(policy, origin)
    return policy, (f"starts from {path}", *_camera_notes(origin.spec, spec))


def overridden(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config with the keys of changes, objects merged key by key."""
    merged = dict(config)
    for name, value in changes.items():
        own = merged.get(name)
        merged[name] = overridden(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return merged


def take_network(policy: Policy[Any], origin: Policy[Any]) -> None:
    """All tensors but those of normalisation, which belong to the data.

    Raises InvalidInput, naming the first tensor that does not fit; policy is then as it was.
    """
    ours, theirs = _network(policy), _network(origin)
    for name, tensor in ours.items():
        if name not in theirs:
            raise InvalidInput("is missing from the checkpoint that the run starts from", field=name)
        if theirs[name].shape != tensor.shape:
            raise InvalidInput(
                f"is {tuple(theirs[name].shape)} in the checkpoint that the run starts from, "
                f"and {tuple(tensor.shape)} with this recipe and data",
                field=name,
            )
    for name in theirs:
        if name not in ours:
            raise InvalidInput("is in the checkpoint that the run starts from, and not in this recipe's policy", field=name)
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _network(policy: Policy[Any]) -> dict[str, torch.Tensor]:
    of_data = {
        f"{module_name}.{name}"
        for module_name, module in policy.named_modules()
        if isinstance(module, Normalizer)
        for name in module.state_dict()
    }
    return {name: tensor for name, tensor in policy.state_dict().items() if name not in of_data}


def _camera_notes(origin: Spec, spec: Spec) -> tuple[str, ...]:
    """Cameras are told apart by their order alone: people should see which took whose place."""
    theirs, ours = [f.name for f in origin.images], [f.name for f in spec.images]
    if theirs == ours:
        return ()
    pairs = itertools.zip_longest(theirs, ours, fillvalue="none")
    return ("cameras by their order, checkpoint to data: " + ", ".join(f"{old} -> {new}" for old, new in pairs),)
