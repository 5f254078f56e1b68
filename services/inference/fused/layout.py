"""Which tensors the fused path keeps, under which names and in which shapes.

They lie one behind the other in one buffer, so that a whole new version of the weights is one copy on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manyhands.errors import InvalidInput
from policies.configuration import TowerSize
from policies.pi052.config import NetworkConfig

from .fp8 import FP8, MULTIPLE

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Attributes:
    entries: By name.
    offsets: Of each entry in the buffer, bytes.
    num_bytes: Of the buffer.
    """

    entries: Mapping[str, Entry]
    offsets: Mapping[str, int]
    num_bytes: int

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The entries inside a uint8 buffer of num_bytes."""
        found = {}
        for name, entry in self.entries.items():
            begin = self.offsets[name]
            found[name] = buffer[begin : begin + entry.num_bytes].view(entry.dtype).view(entry.shape)
        return found


def patch_columns(config: NetworkConfig) -> int:
    """Numbers of one patch, rounded up to what a matrix unit reads in whole words."""
    return -(-3 * config.vision.patch**2 // 8) * 8


def layout(config: NetworkConfig, num_steps: int, dtype: torch.dtype, *, fp8: bool = False) -> Layout:
    """
    Args:
        fp8: The MLPs of a prefix lie there a second time, in FP8, in half as many bytes as in bfloat16.

    Raises:
        InvalidInput: The fused path has no kernels for this network.
    """
    if config.language.kv_heads != 1:
        raise InvalidInput(
            f"is {config.language.kv_heads}; the fused path folds all query heads over one key head, serve this model "
            "with the plain path",
            field="network.language.kv_heads",
        )
    entries = _vision(config, dtype)
    entries |= {f"language.{name}": entry for name, entry in _tower(config.language, 1, dtype, adaptive=False).items()}
    entries |= {
        "token_table": Entry(shape=(config.vocabulary, config.language.width), dtype=dtype),
        "text_head": Entry(shape=(config.vocabulary, config.language.width), dtype=dtype),
    }
    # One entry a step, and the last one for time 0, where committed actions of trained chunking stand.
    tower = _tower(config.expert, num_steps + 1, dtype, adaptive=True)
    entries |= {f"expert.{name}": entry for name, entry in tower.items()}
    entries |= {
        "action_in.weight": Entry(shape=(config.expert.width, config.action_size), dtype=torch.float32),
        "action_in.bias": Entry(shape=(config.expert.width,), dtype=torch.float32),
        "action_out.weight": Entry(shape=(config.action_size, config.expert.width), dtype=torch.float32),
        "action_out.bias": Entry(shape=(config.action_size,), dtype=torch.float32),
    }
    if fp8:
        entries |= _prefix_fp8(config.language)
    offsets, end = {}, 0
    for name, entry in entries.items():
        offsets[name] = end
        end += -(-entry.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Layout(entries=entries, offsets=offsets, num_bytes=end)


def _tower(size: TowerSize, num_entries: int, dtype: torch.dtype, *, adaptive: bool) -> dict[str, Entry]:
    width, inner = size.width, size.heads * size.head_dim
    num_qkv = inner + 2 * size.kv_heads * size.head_dim
    entries: dict[str, Entry] = {}
    for index in range(size.depth):
        at = f"layers.{index}."
        entries |= {
            f"{at}qkv": Entry(shape=(num_qkv, width), dtype=dtype),
            f"{at}o": Entry(shape=(width, inner), dtype=dtype),
            f"{at}gate_up": Entry(shape=(2 * size.mlp, width), dtype=dtype),
            f"{at}down": Entry(shape=(width, size.mlp), dtype=dtype),
        }
        entries |= _norm(f"{at}norm_1", width, num_entries, adaptive=adaptive)
        entries |= _norm(f"{at}norm_2", width, num_entries, adaptive=adaptive)
    return entries | _norm("norm", width, num_entries, adaptive=adaptive)


def _prefix_fp8(size: TowerSize) -> dict[str, Entry]:
    """Of all layers but the last, which a prefix does not run."""
    if size.width % MULTIPLE or size.mlp % MULTIPLE:
        raise InvalidInput(
            f"has width {size.width} and MLP width {size.mlp}; FP8 multiplies multiples of {MULTIPLE}, serve "
            "this model without it",
            field="network.language",
        )
    entries: dict[str, Entry] = {}
    for index in range(size.depth - 1):
        for name, shape in (("gate_up", (2 * size.mlp, size.width)), ("down", (size.width, size.mlp))):
            at = f"language.layers.{index}.{name}"
            entries[f"{at}_fp8"] = Entry(shape=shape, dtype=FP8)
            entries[f"{at}_scale"] = Entry(shape=(shape[0], 1), dtype=torch.float32)
    return entries


def _norm(name: str, width: int, num_entries: int, *, adaptive: bool) -> dict[str, Entry]:
    parts = ("scale", "shift", "gate") if adaptive else ("scale",)
    return {f"{name}.{part}": _table(num_entries, width) for part in parts}


def _table(num_entries: int, width: int) -> Entry:
    return Entry(shape=(num_entries, width), dtype=torch.float32)


def _vision(config: NetworkConfig, dtype: torch.dtype) -> dict[str, Entry]:
    size = config.vision
    shapes: dict[str, tuple[int, ...]] = {
        "patch.weight": (size.width, patch_columns(config)),
        "position": (config.num_patches, size.width),
        "norm.weight": (size.width,),
        "norm.bias": (size.width,),
        "projector.weight": (config.language.width, size.width),
        "projector.bias": (config.language.width,),
    }
    for index in range(size.depth):
        for name, shape in (
            ("norm_1.weight", (size.width,)),
            ("norm_1.bias", (size.width,)),
            ("qkv.weight", (3 * size.width, size.width)),
            ("qkv.bias", (3 * size.width,)),
            ("o.weight", (size.width, size.width)),
            ("o.bias", (size.width,)),
            ("norm_2.weight", (size.width,)),
            ("norm_2.bias", (size.width,)),
            ("up.weight", (size.mlp, size.width)),
            ("up.bias", (size.mlp,)),
            ("down.weight", (size.width, size.mlp)),
            ("down.bias", (size.width,)),
        ):
            shapes[f"layers.{index}.{name}"] = shape
    # Biases and norms are vectors that a kernel adds in float32; matrices are what is multiplied.
    wide = ("patch.weight", "projector.weight", "qkv.weight", "o.weight", "up.weight", "down.weight")
    narrow_bias = ("projector.bias", "qkv.bias", "up.bias")  # Added inside the matrix product, which wants its own dtype.
    return {
        f"vision.{name}": Entry(shape=shape, dtype=dtype if name.endswith((*wide, *narrow_bias)) else torch.float32)
        for name, shape in shapes.items()
    }
