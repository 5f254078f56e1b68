"""A policy on disk: a folder with config.json (type, configuration, spec) and model.safetensors; and as named arrays.

    config.json        {"type": "flow", "config": {...}, "spec": {...}}; spec is the JSON form of common.v1.Spec
    model.safetensors  every tensor of the state dict, statistics included
    tokenizer/, ...    what else the policy needs, under the names of files.py

Reading builds the class the closed registry names; no code comes from the folder. Every tensor must be there, with its shape
and dtype, finite, and none besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
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

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100 * 1024 * 1024


def build(policy_type: str, config: Mapping[str, Any], spec: Spec, files: Files | None = None) -> Policy[Any]:
    """A policy with fresh weights drawn from torch's default generator."""
    policy = registry.policy_class(policy_type).from_config(config, spec)
    policy.take_files(files or {})
    return policy


def save(policy: Policy[Any], folder: Path) -> None:
    """Writes the folder whole or not at all; what stood there before is replaced."""
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
    """An empty folder to fill, which takes its name when everything in it is on disk; on an exception nothing is left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    unfinished.mkdir()
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


def load(folder: Path, device: torch.device | None = None) -> Policy[Any]:
    """The policy in folder, in evaluation mode.

    Raises:
        NotFound: No such folder, or one of its files is missing.
        Corrupt: A file is cut off or unreadable; names the tensor where it is one.
        InvalidInput: A configuration, spec or tensor that cannot be; names it.
    """
    policy_type, config, spec = read_config(folder)
    policy = build(policy_type, config, spec, policy_files.read(folder))
    load_tensors(policy, read_tensors(folder))
    return policy.to(device or torch.device("cpu")).eval()


def read_config(folder: Path) -> tuple[str, dict[str, Any], Spec]:
    """(type, configuration, spec) of a checkpoint, without its weights."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise NotFound(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}", field="checkpoint")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise Corrupt(f"{path} is not JSON: {error}", field="checkpoint") from None
    if not isinstance(description, dict) or set(description) != {"type", "config", "spec"}:
        raise InvalidInput(f"{path} must hold exactly type, config and spec", field="checkpoint")
    if not isinstance(description["type"], str) or not isinstance(description["config"], dict):
        raise InvalidInput(f"{path}: type must be a string and config an object", field="checkpoint")
    return description["type"], description["config"], spec_from_json(description["spec"])


def load_tensors(policy: Policy[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces all weights and statistics, after checking every one: on an error the policy is as it was."""
    expected = policy.state_dict()
    for name in expected:
        if name not in tensors:
            raise InvalidInput("is missing from the weights", field=name)
    for name, tensor in tensors.items():
        if name not in expected:
            raise InvalidInput(f"is not a tensor of policy type {policy.type_name!r}", field=name)
        own = expected[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise InvalidInput(
                f"is {tuple(tensor.shape)} {tensor.dtype}, the configuration says {tuple(own.shape)} {own.dtype}", field=name
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput("holds a NaN or infinity", field=name)
    policy.load_state_dict(dict(tensors), strict=True)


def config_json(policy: Policy[Any]) -> str:
    """The configuration as it stands in a weights manifest."""
    return json.dumps(policy.config_dict(), sort_keys=True)


def to_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    """Tensors as WeightsClient.publish() takes them: the bytes are copied, so training may go on."""
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
        raise InvalidInput(f"is not the JSON form of a spec: {error}", field="spec") from None
    return Spec.from_proto(message)


def _raw_tensor(tensor: torch.Tensor, name: str) -> RawTensor:
    is_bfloat16 = tensor.dtype is torch.bfloat16
    array = (tensor.view(torch.uint16) if is_bfloat16 else tensor).numpy()
    raw = weights_manifest.raw_tensor(array, field=name)
    dtype = int(common_pb2.DATA_TYPE_BFLOAT16) if is_bfloat16 else raw.dtype
    return RawTensor(dtype=dtype, shape=raw.shape, data=bytes(raw.data))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, unchecked against any policy.

    Raises:
        NotFound: It has none.
        Corrupt: The file is cut off, naming the tensor, or unreadable.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise NotFound(f"{path.parent} is not a checkpoint: it has no {TENSORS_FILE}", field="checkpoint")
    _check_extent(path)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = opened.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise Corrupt(f"{path} cannot be read: {error}", field="checkpoint") from None
    return tensors


def _check_extent(path: Path) -> None:
    """Raises Corrupt with the first tensor that the file is too short for; the library only says that it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
            raise Corrupt(f"{path} is cut off in its header ({size} bytes)", field="checkpoint")
        try:
            header = json.loads(file.read(header_size))
            ends = sorted(
                (int(entry["data_offsets"][1]), str(name)) for name, entry in header.items() if name != "__metadata__"
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise Corrupt(f"{path} has an unreadable header", field="checkpoint") from None
    for end, name in ends:
        if 8 + header_size + end > size:
            raise Corrupt(f"{path} is cut off: it ends inside or before this tensor", field=name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
