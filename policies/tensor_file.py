"""A safetensors file, one tensor in memory at a time: what is read is the reader's own, and the file may then go away."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch

from manyhands.errors import Corrupt, NotFound

MAX_HEADER_BYTES = 100 * 1024 * 1024
_CHECKED_AT_ONCE = 1 << 18
# The bits that are all set in an infinity and in what is no number. torch.isfinite() takes 40 times as long on bfloat16.
_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
}


class TensorFile(Mapping[str, torch.Tensor]):
    """Tensors by name, on the CPU, each read anew when asked for.

    The library maps a file into memory and keeps every page that was touched until all its tensors are gone; a large policy
    would then be in memory twice while it is being placed. So the file is opened for each tensor.

    Raises:
        NotFound: There is no such file.
        Corrupt: It is cut off, naming the first tensor that suffers, or unreadable.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NotFound(f"{path.parent} is not a checkpoint: it has no {path.name}", field="checkpoint")
        self.path = path
        self._sizes = read_extents(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._sizes:
            raise KeyError(name)
        try:
            with safetensors.safe_open(self.path, framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
                return tensor.clone()
        except (safetensors.SafetensorError, OSError) as error:
            raise Corrupt(f"{self.path} cannot be read: {error}", field=name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def num_bytes(self, name: str) -> int:
        return self._sizes[name]


def read_extents(path: Path) -> dict[str, int]:
    """Bytes of each tensor, in the order of the file; Corrupt names the first that the file is too short for.

    The library only says that a file is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
            raise Corrupt(f"{path} is cut off in its header ({size} bytes)", field="checkpoint")
        try:
            header = json.loads(file.read(header_size))
            extents = sorted(
                (int(entry["data_offsets"][1]), int(entry["data_offsets"][0]), str(name))
                for name, entry in header.items()
                if name != "__metadata__"
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise Corrupt(f"{path} has an unreadable header", field="checkpoint") from None
    for end, _, name in extents:
        if 8 + header_size + end > size:
            raise Corrupt(f"{path} is cut off: it ends inside or before this tensor", field=name)
    return {name: end - begin for end, begin, name in extents}


def is_finite(tensor: torch.Tensor) -> bool:
    """Of floating point, on any device. In parts that a processor's cache holds: a vocabulary's table is large."""
    kind = _EXPONENTS.get(tensor.dtype)
    if kind is None:
        return all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(), _CHECKED_AT_ONCE))
    integer, exponent = kind
    parts = torch.split(tensor.detach().flatten().view(integer), _CHECKED_AT_ONCE)
    return not any(part.numel() and int((part & exponent).max()) == exponent for part in parts)
