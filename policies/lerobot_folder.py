"""A policy in lerobot's folder, read and written.

    config.json                 fields of lerobot's own (pi052/lerobot_config.py, smolvla2/lerobot_config.py)
    model.safetensors           weights under its names (checkpoint_keys.py), or several files with an index
    policy_preprocessor.json    and policy_postprocessor.json with statistics (lerobot_processors.py)
    tokenizer/, ...             ours: what files.py names; lerobot loads tokenizers by name

What is read acts as it does in lerobot, or is refused. docs/design/0017-lerobot-checkpoints.md has the reasons.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from manyhands.errors import Corrupt, InvalidInput, NotFound, NotOffered
from manyhands.spec import Spec

from . import checkpoint, lerobot_fields, lerobot_files, lerobot_processors, normalization, registry, vectors
from . import files as policy_files
from .lerobot_fields import Described, Features
from .lerobot_processors import Processing
from .normalization import Normalization, Normalizer
from .pi052 import checkpoint_keys as pi_keys
from .pi052 import config as pi_configs
from .pi052 import lerobot_config as pi_fields
from .policy import Policy
from .prompted import PromptedPolicy
from .smolvla2 import checkpoint_keys as smol_keys
from .smolvla2 import config as smol_configs
from .smolvla2 import lerobot_config as smol_fields
from .tensor_file import TensorFile
from .weight_names import KeyPlan

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

Progress = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Three modules, and what lerobot names the tokenizer."""

    fields: Any
    configs: Any
    keys: Any
    tokenizer: str


_PI = _Family(fields=pi_fields, configs=pi_configs, keys=pi_keys, tokenizer=lerobot_files.PALIGEMMA)
_SMOL = _Family(fields=smol_fields, configs=smol_configs, keys=smol_keys, tokenizer=lerobot_files.SMOLVLM)
_FAMILIES = {"pi05": _PI, "pi052": _PI, "smolvla": _SMOL, "smolvla2": _SMOL}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Attributes:
    policy: In evaluation mode.
    notes: What was left out, is missing or was decided, for the user.
    """

    policy: Policy[Any]
    notes: tuple[str, ...]


def is_one(folder: Path) -> bool:
    """Whether this is lerobot's folder, not ours or none."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "type" in values and "config" not in values


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    folder: Path,
    *,
    spec: Spec | None = None,
    control_rate_hz: float = 30.0,
    tokenizer: Path | None = None,
    action_tokenizer: Path | None = None,
    recipe: Path | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Imported:
    """The policy of a folder of type pi05, pi052, smolvla or smolvla2.

    Needs little more memory than the weights have, in the precision that config.json says.

    Args:
        spec: Of the robot; None: what config.json says of it, with control_rate_hz.
        tokenizer, action_tokenizer: Folders with tokenizer.json; None: those in the folder, else those that the local
            Hugging Face cache has under their usual names. Nothing is fetched.
        recipe: A YAML file; None: the shipped one that config.json names, or a file of that name in the folder.
        progress: Called with each tensor that is in place: its name and its bytes in the file.

    Raises:
        NotFound: A file is missing.
        Corrupt: A file cannot be read, or a tensor is missing, unknown, misshapen or not finite; names it.
        InvalidInput: A field, a processor step or a statistic that is not what we compute, or a spec that does not fit.
    """
    values = _read_config(folder)
    type_name = values.get("type")
    if not isinstance(type_name, str) or type_name not in _FAMILIES:
        raise NotOffered(f"is {type_name!r}; of lerobot's, {', '.join(_FAMILIES)} can be read", field="type")
    family = _FAMILIES[type_name]
    described: Described[Any] = family.fields.read(values)
    notes = list(described.notes)
    weights = _open_weights(folder)
    processing = lerobot_processors.read(folder, described)
    if processing is None:
        processing = lerobot_processors.read_old(weights, described)
        notes.append(
            f"there are no processor files; {'old buffers have' if processing.action else 'nothing has'} statistics"
        )
    described = _with_names(described, processing)

    found = lerobot_files.find(
        folder, described, processing, tokenizer=tokenizer, action_tokenizer=action_tokenizer, recipe=recipe
    )
    config = dataclasses.replace(
        described.config, prompts=dataclasses.replace(described.config.prompts, recipe=found.recipe)
    )
    if processing.prompt_length is not None:
        config = dataclasses.replace(config, prompt_length=processing.prompt_length)
    derived = lerobot_fields.derive_spec(described.features, processing.renamed, control_rate_hz)
    spec = derived if spec is None else lerobot_fields.check_spec(spec, described.features, derived, notes)

    with torch.device("meta"):
        policy = registry.policy_class(type_name).from_config(family.configs.dump(config), spec)
    assert isinstance(policy, PromptedPolicy)
    _check_relative(policy, described)
    plan: KeyPlan = family.keys.load(policy.network, weights, device=device or torch.device("cpu"), progress=progress)
    if plan.dropped:
        notes.append(f"{len(plan.dropped)} tensors are no weights of this network and are left out, as {plan.dropped[0]}")
    _set_statistics(policy, processing, described.features, notes)
    policy.take_files(found.files)
    return Imported(policy=policy.to(device or torch.device("cpu")).eval(), notes=(*notes, *found.notes))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise NotFound(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}", field="checkpoint")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not JSON: {error}", field="checkpoint") from None
    if not isinstance(values, dict):
        raise Corrupt(f"{path} is no object", field="checkpoint")
    return values


class _Shards(Mapping[str, torch.Tensor]):
    """Several tensor files as one."""

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    path = folder / INDEX_FILE
    if not path.is_file():
        return TensorFile(folder / checkpoint.TENSORS_FILE)
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise Corrupt(f"{path} is no index of tensors: {error!r}", field="checkpoint") from None
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidInput(f"{path} names {name!r}, must be the name of a file beside it", field="weight_map")
    files = {name: TensorFile(folder / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in files[name]:
            raise Corrupt(f"{INDEX_FILE} says that {name} holds it, but it does not", field=key)
    return _Shards({key: files[name] for key, name in places.items()})


def _with_names(described: Described[Any], processing: Processing) -> Described[Any]:
    """Of actions, where only the processor knows them."""
    if processing.action_names is None:
        return described
    features = dataclasses.replace(described.features, action_names=processing.action_names)
    config = dataclasses.replace(described.config, relative_exclude=processing.relative_exclude)
    return dataclasses.replace(described, features=features, config=config)


# -- the robot ---------------------------------------------------------------------------------------------------------


def _check_relative(policy: PromptedPolicy[Any, Any], described: Described[Any]) -> None:
    """The same actions are relative by the robot's names as by the checkpoint's."""
    mask = policy.relative_action_mask()
    if mask is None:
        return
    expected = normalization.relative_mask(
        policy.robot_action_size, described.features.action_names, described.config.relative_exclude
    )
    differing = np.flatnonzero(mask != expected)
    if len(differing):
        names = vectors.element_names(policy.spec.action)
        raise InvalidInput(
            f"action {names[differing[0]]!r} is relative by the robot's names or by the checkpoint's, not by both; "
            f"those are {', '.join(described.features.action_names or ('none',))}",
            field="spec.action",
        )


def _set_statistics(policy: PromptedPolicy[Any, Any], processing: Processing, features: Features, notes: list[str]) -> None:
    config, spec = policy.config, policy.spec
    policy.state_normalizer = Normalizer(config.state_normalization, vectors.size(spec.states))
    policy.action_normalizer = Normalizer(config.action_normalization, vectors.size(spec.action))
    for what, normalizer, statistics, size, full in (
        ("state", policy.state_normalizer, processing.state, vectors.size(spec.states), features.state_size),
        ("action", policy.action_normalizer, processing.action, vectors.size(spec.action), features.action_size),
    ):
        if normalizer.normalization is Normalization.IDENTITY or not size:
            continue
        if statistics is not None and size == full:
            normalizer.set(statistics, field=what)
        elif statistics is not None:
            notes.append(f"{what}: statistics are of {full} numbers, the robot has {size}; they are left out ({_UNITS})")
        else:
            notes.append(f"{what}: the checkpoint has no statistics ({_UNITS})")


_UNITS = "the policy works in normalised units until it is trained or given some"


# -- writing -----------------------------------------------------------------------------------------------------------


def write(policy: Policy[Any], folder: Path) -> None:
    """Writes the folder whole or not at all; a checkpoint that stood there is replaced, anything else refused.

    lerobot has one state and one action: features of a spec with several are joined.

    Raises:
        NotOffered: lerobot has no such policy.
        InvalidInput: A size or a camera's name that lerobot cannot write down; names it.
    """
    values = config_of(policy)
    assert isinstance(policy, PromptedPolicy)
    family = _FAMILIES[policy.type_name]
    with checkpoint.whole_folder(folder) as unfinished:
        (unfinished / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in family.keys.save(policy.network).items()}
        save_file(weights, unfinished / checkpoint.TENSORS_FILE, metadata={"format": "pt"})
        lerobot_processors.write(
            unfinished,
            values,
            tokenizer_name=family.tokenizer,
            action_tokenizer_name=lerobot_files.FAST,
            state=policy.state_normalizer,
            action=policy.action_normalizer,
            with_fast=bool(values.get("enable_fast_action_loss", False)),
        )
        policy_files.write(policy.files, unfinished)
        lerobot_files.describe_tokenizer(unfinished, family.tokenizer)


def config_of(policy: Policy[Any]) -> dict[str, Any]:
    """The fields of config.json; raises as write()."""
    if policy.type_name not in _FAMILIES:
        raise NotOffered(f"type {policy.type_name!r} is not lerobot's; {', '.join(_FAMILIES)} are", field="type")
    assert isinstance(policy, PromptedPolicy)
    if policy.config.byte_prompts:
        raise InvalidInput("is on; lerobot has no prompts without a tokenizer", field="byte_prompts")
    values: dict[str, Any] = _FAMILIES[policy.type_name].fields.write(policy.type_name, policy.config, policy.spec)
    return values
