"""A policy on disk: a folder with config.json (type, configuration, spec) and model.safetensors; and as named arrays.

    config.json        {"type": "flow", "config": {...}, "spec": {...}}; spec is the JSON form of common.v1.Spec
    model.safetensors  every tensor of the state dict, statistics included
    tokenizer/, ...    what else the policy needs, under the names of files.py

Reading builds the class the closed registry names; no code comes from the folder. Every tensor must be there, with its shape
and dtype, finite, and none besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import json_format
from safetensors.torch import save_file

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import Corrupt, InvalidInput, NotFound
from manyhands.spec import Spec
from manyhands.weights_manifest import RawTensor

from . import files as policy_files
from . import registry
from .files import Files
from .policy import Policy
from .tensor_file import TensorFile, is_finite

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"


def build(policy_type: str, config: Mapping[str, Any], spec: Spec, files: Files | None = None) -> Policy[Any]:
    """A policy with fresh weights drawn from torch's default generator."""
    policy = registry.policy_class(policy_type).from_config(config, spec)
    policy.take_files(files or {})
    return policy


def save(policy: Policy[Any], folder: Path) -> None:
    """Writes the folder whole or not at all; a checkpoint that stood there is replaced, anything else refused."""
    with whole_folder(folder) as unfinished:
        write(policy, unfinished)


def write(policy: Policy[Any], folder: Path, *, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes the two files into an existing folder. tensors: Instead of the policy's own, for averaged weights."""
    state = policy.state_dict() if tensors is None else tensors
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, folder / TENSORS_FILE, metadata={"format": "pt"})
    description = {"type": policy.type_name, "config": policy.config_dict(), "spec": spec_to_json(policy.spec)}
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    policy_files.write(policy.files, folder)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes its name when everything in it is on disk; on an exception nothing is left.

    Raises:
        InvalidInput: What stands there is neither a checkpoint nor an empty folder, and is left alone; or no folder can be
            made beside it.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InvalidInput(f"{folder.parent} cannot be written to: {error.strerror}", field="output") from None
    try:
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            _sync(path)
        if folder.exists():
            replaced = unfinished.with_suffix(".replaced")
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Only a checkpoint is replaced: a mistyped name must not cost somebody the folder of all of them."""
    if not folder.exists() or ((folder / CONFIG_FILE).is_file() and (folder / TENSORS_FILE).is_file()):
        return
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is a file; name a folder that is new, empty or a checkpoint", field="output")
    found = next(folder.iterdir(), None)
    if found is not None:
        raise InvalidInput(
            f"{folder} holds {found.name} and is no checkpoint; name a folder that is new, empty or a checkpoint",
            field="output",
        )


def load(
    folder: Path, device: torch.device | None = None, *, progress: Callable[[str, int], None] | None = None
) -> Policy[Any]:
    """The policy in folder, in evaluation mode.

    Needs little more memory than the weights have: the module is built without any, and tensors are put in place one by one.

    Args:
        progress: Called with the name and the bytes of each tensor that is in place.

    Raises:
        NotFound: No such folder, or one of its files is missing.
        Corrupt: A file is cut off or unreadable; names the tensor where it is one.
        InvalidInput: A configuration, spec or tensor that cannot be; names it.
    """
    device = device or torch.device("cpu")
    policy_type, config, spec = read_config(folder)
    with torch.device("meta"):
        policy = build(policy_type, config, spec, policy_files.read(folder))
    _place(policy, TensorFile(folder / TENSORS_FILE), device, progress)
    return policy.eval()


def read_config(folder: Path) -> tuple[str, dict[str, Any], Spec]:
    """(type, configuration, spec) of a checkpoint, without its weights."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise NotFound(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}", field="checkpoint")
    try:
        description = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not JSON: {error}", field="checkpoint") from None
    if not isinstance(description, dict) or set(description) != {"type", "config", "spec"}:
        raise InvalidInput(f"{path} must hold exactly type, config and spec", field="checkpoint")
    if not isinstance(description["type"], str) or not isinstance(description["config"], dict):
        raise InvalidInput(f"{path}: type must be a string and config an object", field="checkpoint")
    return description["type"], description["config"], spec_from_json(description["spec"])


def load_tensors(policy: Policy[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces the values of all weights and statistics; on an error the policy is as it was."""
    expected = policy.state_dict()
    _check_names(expected, tensors, policy.type_name)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, expected[name])
    policy.load_state_dict(dict(tensors), strict=True)


def _place(
    policy: Policy[Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    progress: Callable[[str, int], None] | None,
) -> None:
    """Gives a policy on the meta device its tensors."""
    expected = policy.state_dict()
    _check_names(expected, tensors, policy.type_name)
    placed = {}
    for name in tensors:
        tensor = tensors[name]
        _check_tensor(name, tensor, expected[name])
        placed[name] = tensor.to(device)
        if progress is not None:
            progress(name, tensor.numel() * tensor.element_size())
    policy.load_state_dict(placed, strict=True, assign=True)


def _check_names(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], policy_type: str) -> None:
    for name in expected:
        if name not in tensors:
            raise InvalidInput("is missing from the weights", field=name)
    for name in tensors:
        if name not in expected:
            raise InvalidInput(f"is not a tensor of policy type {policy_type!r}", field=name)


def _check_tensor(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise InvalidInput(
            f"is {tuple(tensor.shape)} {tensor.dtype}, the configuration says {tuple(expected.shape)} {expected.dtype}",
            field=name,
        )
    if tensor.is_floating_point() and not is_finite(tensor):
        raise InvalidInput("holds a NaN or infinity", field=name)


def config_json(policy: Policy[Any]) -> str:
    """The configuration as it stands in a weights manifest."""
    return json.dumps(policy.config_dict(), sort_keys=True)


def to_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    """Tensors as WeightsClient.publish() takes them: the bytes are copied, so training may go on."""
    viewed = as_wire(tensors)
    return {name: dataclasses.replace(raw, data=bytes(raw.data)) for name, raw in viewed.items()}


def as_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    """As to_wire(), but the bytes are those of the tensors themselves where they are on the CPU."""
    return {name: _raw_tensor(tensor.detach().cpu().contiguous(), name) for name, tensor in sorted(tensors.items())}


def from_wire(tensors: Mapping[str, RawTensor]) -> dict[str, torch.Tensor]:
    """Tensors of what WeightsClient.fetch() answered, for load_tensors()."""
    answer: dict[str, torch.Tensor] = {}
    for name, raw in tensors.items():
        tensor = torch.from_numpy(np.array(raw.array()))  # A copy: what travelled may be read-only.
        answer[name] = tensor.view(torch.bfloat16) if raw.dtype == common_pb2.DATA_TYPE_BFLOAT16 else tensor
    return answer


def spec_to_json(spec: Spec) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(spec.to_proto(), preserving_proto_field_name=True)
    return value


def spec_from_json(value: Any) -> Spec:
    """Raises InvalidInput for anything that is not a spec with its own digest."""
    try:
        message = json_format.ParseDict(value, common_pb2.Spec())
    except json_format.ParseError as error:
        raise InvalidInput(f"is not the JSON form that a checkpoint's config.json has: {error}", field="spec") from None
    return Spec.from_proto(message)


def _raw_tensor(tensor: torch.Tensor, name: str) -> RawTensor:
    is_bfloat16 = tensor.dtype is torch.bfloat16
    array = (tensor.view(torch.uint16) if is_bfloat16 else tensor).numpy()
    raw = weights_manifest.raw_tensor(array, field=name)
    dtype = int(common_pb2.DATA_TYPE_BFLOAT16) if is_bfloat16 else raw.dtype
    return RawTensor(dtype=dtype, shape=raw.shape, data=raw.data)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, unchecked against any policy; NotFound or Corrupt as load()."""
    return dict(TensorFile(folder / TENSORS_FILE))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
